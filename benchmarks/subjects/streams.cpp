// The simplest streams over memory, on torch's threads: the fastest that a pass over tensors can be on this machine.
//
// All pointers must be aligned to 64 bytes, as torch's allocations are. A remainder of less than a line is skipped.

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {
constexpr int64_t kLine = 64, kGrain = 1024;
typedef int64_t Line __attribute__((vector_size(kLine), may_alias));

// Returns the exclusive or of all lines. `b` may be null.
Line read(const Line* a, const Line* b, int64_t lines) {
  Line s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  if (b) {
    for (; i + 2 <= lines; i += 2) s0 ^= a[i], s1 ^= b[i], s2 ^= a[i + 1], s3 ^= b[i + 1];
    for (; i < lines; ++i) s0 ^= a[i], s1 ^= b[i];
  } else {
    for (; i + 4 <= lines; i += 4) s0 ^= a[i], s1 ^= a[i + 1], s2 ^= a[i + 2], s3 ^= a[i + 3];
    for (; i < lines; ++i) s0 ^= a[i];
  }
  return (s0 ^ s1) ^ (s2 ^ s3);
}

// A store that bypasses the caches, where the processor has one.
void put_non_temporal(Line* to, const Line& value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(value));
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, reinterpret_cast<const __m128i*>(&value)[i]);
  }
#else
  *to = value;
#endif
}

// to = a, or the exclusive or of a and b if `b` is not null.
void map(Line* to, const Line* a, const Line* b, int64_t lines, bool non_temporal) {
  if (non_temporal && b) {
    for (int64_t i = 0; i < lines; ++i) put_non_temporal(to + i, a[i] ^ b[i]);
  } else if (non_temporal) {
    for (int64_t i = 0; i < lines; ++i) put_non_temporal(to + i, a[i]);
  } else if (b) {
    for (int64_t i = 0; i < lines; ++i) to[i] = a[i] ^ b[i];
  } else {
    for (int64_t i = 0; i < lines; ++i) to[i] = a[i];
  }
}

void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

int64_t all_of(const Line& line) {
  int64_t all = 0;
  for (int i = 0; i < 8; ++i) all ^= line[i];
  return all;
}

const Line* from(const Line* p, int64_t offset) { return p ? p + offset : nullptr; }
}  // namespace

// Reads a, and b unless it is null. Returns the exclusive or of all 64-bit words.
EXPORTED int64_t stream_read(const Line* a, const Line* b, int64_t bytes) {
  std::atomic<int64_t> all{0};
  torch::stable::parallel_for(0, bytes / kLine, kGrain, [&](int64_t begin, int64_t end) {
    all ^= all_of(read(a + begin, from(b, begin), end - begin));
  });
  return all;
}

// Reads a, and b unless it is null, and writes `to`.
EXPORTED void stream_map(Line* to, const Line* a, const Line* b, int64_t bytes, bool non_temporal) {
  torch::stable::parallel_for(0, bytes / kLine, kGrain, [=](int64_t begin, int64_t end) {
    map(to + begin, a + begin, from(b, begin), end - begin, non_temporal);
    if (non_temporal) fence();
  });
}

// The same in the order of batch normalization over [samples, groups of channels]: reads a group of every sample, then
// maps it while it is in the cache, the last sample first. A group of a sample has `lines` contiguous lines. Returns the
// exclusive or of all 64-bit words that were read.
EXPORTED int64_t stream_channels(Line* to, const Line* a, const Line* b, int64_t samples, int64_t groups, int64_t lines,
                                 bool non_temporal) {
  std::atomic<int64_t> all{0};
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      auto offset = [&](int64_t n) { return (n * groups + group) * lines; };
      Line sum{};
      for (int64_t n = 0; n < samples; ++n) sum ^= read(a + offset(n), from(b, offset(n)), lines);
      all ^= all_of(sum);
      for (int64_t n = samples - 1; n >= 0; --n) {
        map(to + offset(n), a + offset(n), from(b, offset(n)), lines, non_temporal);
      }
    }
    if (non_temporal) fence();
  });
  return all;
}
