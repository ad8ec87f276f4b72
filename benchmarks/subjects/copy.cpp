// A copy with non-temporal stores, over torch's threads: half of what tells the fastest that memory can be moved.

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {
constexpr int64_t kLine = 64;

void copy_lines(char* dst, const char* src, int64_t lines) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < lines; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i * kLine), _mm512_loadu_si512(src + i * kLine));
  }
#elif defined(__SSE2__)
  for (int64_t i = 0; i < lines * 4; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst) + i, _mm_loadu_si128(reinterpret_cast<const __m128i*>(src) + i));
  }
#else
  std::memcpy(dst, src, static_cast<size_t>(lines * kLine));
#endif
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
}  // namespace

// dst must be aligned to 64 bytes, as torch's allocations are; a remainder of less than a line is not copied.
extern "C" __attribute__((visibility("default"))) void copy_non_temporal(char* dst, const char* src, int64_t bytes) {
  torch::stable::parallel_for(0, bytes / kLine, 1024, [=](int64_t begin, int64_t end) {
    copy_lines(dst + begin * kLine, src + begin * kLine, end - begin);
  });
}
