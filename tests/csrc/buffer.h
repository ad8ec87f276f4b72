// Memory of exactly the size that a kernel may access, so that AddressSanitizer detects every other access. Values are
// converted between the four dtypes by arithmetic, independently of the kernels' code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels/kernels.h"

using namespace batchnorm;

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct Format {
  int digits, lowest;  // bits of the significand; the exponent of the smallest subnormal
  double largest;
};
inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return {53, -1074, std::numeric_limits<double>::max()};
    case DType::float32:
      return {24, -149, static_cast<double>(std::numeric_limits<float>::max())};
    case DType::bfloat16:
      return {8, -133, std::ldexp(255.0, 120)};
    default:
      return {11, -24, 65504.0};
  }
}
inline double unit(DType dtype) { return std::ldexp(1.0, -format_of(dtype).digits); }
inline double smallest(DType dtype) { return std::ldexp(1.0, format_of(dtype).lowest); }

// Rounds v to the dtype: to nearest, ties to even.
inline double rounded(DType dtype, double v) {
  if (dtype == DType::float64 || v == 0.0 || !std::isfinite(v)) return v;
  const Format f = format_of(dtype);
  int exponent = 0;
  std::frexp(v, &exponent);
  const int last = exponent - f.digits > f.lowest ? exponent - f.digits : f.lowest;
  const double r = std::ldexp(std::nearbyint(std::ldexp(v, -last)), last);
  return std::abs(r) > f.largest ? std::copysign(INFINITY, v) : r;
}

class Buffer {
 public:
  // Aligns the first value to a cache line. With `skip`, that many values precede it, so that it is not aligned.
  Buffer(DType dtype_, int64_t size, int64_t skip = 0)
      : dtype(dtype_),
        count(size),
        skip_(skip),
        bytes_(
            static_cast<unsigned char*>(::operator new(static_cast<size_t>((size + skip) * size_of(dtype_)), kLine))) {}
  Buffer(DType dtype_, const std::vector<double>& values, int64_t skip = 0)
      : Buffer(dtype_, static_cast<int64_t>(values.size()), skip) {
    for (int64_t i = 0; i < count; ++i) set(i, values[i]);
  }
  void poison() {
    for (int64_t i = 0; i < count; ++i) set(i, NAN);
  }
  void* data() { return bytes_.get() + skip_ * size_of(dtype); }
  const void* data() const { return bytes_.get() + skip_ * size_of(dtype); }

  double get(int64_t i) const {
    const unsigned char* p = bytes_.get() + (i + skip_) * size_of(dtype);
    if (dtype == DType::float64) return load<double>(p);
    if (dtype == DType::float32) return static_cast<double>(load<float>(p));
    const uint16_t bits = load<uint16_t>(p);
    if (dtype == DType::bfloat16) {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      return static_cast<double>(load<float>(reinterpret_cast<const unsigned char*>(&wide)));
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
  }
  void set(int64_t i, double v) {
    unsigned char* p = bytes_.get() + (i + skip_) * size_of(dtype);
    v = rounded(dtype, v);
    if (dtype == DType::float64) return store(p, v);
    const auto narrow = static_cast<float>(v);
    if (dtype == DType::float32) return store(p, narrow);
    if (dtype == DType::bfloat16) {
      uint32_t bits;
      std::memcpy(&bits, &narrow, sizeof bits);
      return store(p, static_cast<uint16_t>(bits >> 16));
    }
    const double magnitude = std::abs(v);
    int exponent = 0;
    std::frexp(magnitude, &exponent);  // magnitude = [0.5, 1)·2^exponent
    uint16_t bits = std::isnan(v) ? 0x7e00 : std::isinf(v) ? 0x7c00 : 0;
    if (std::isfinite(v)) {
      bits = exponent < -13 ? static_cast<uint16_t>(std::ldexp(magnitude, 24))
                            : static_cast<uint16_t>((exponent + 13) * 1024 + std::ldexp(magnitude, 11 - exponent));
    }
    store(p, static_cast<uint16_t>(bits | (std::signbit(v) ? 0x8000 : 0)));
  }
  std::vector<double> values() const {
    std::vector<double> v(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) v[i] = get(i);
    return v;
  }
  bool same_bits(const Buffer& other) const {
    return std::memcmp(data(), other.data(), static_cast<size_t>(count * size_of(dtype))) == 0;
  }

  DType dtype;
  int64_t count;

 private:
  template <class V>
  static V load(const unsigned char* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class V>
  static void store(unsigned char* p, V v) {
    std::memcpy(p, &v, sizeof v);
  }
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete(p, kLine); }
  };
  int64_t skip_;
  std::unique_ptr<unsigned char[], Free> bytes_;
};

// A buffer and its values as the kernel sees them.
struct Held {
  Buffer buffer;
  std::vector<double> values;
  Held(DType dtype, const std::vector<double>& v, int64_t skip = 0) : buffer(dtype, v, skip), values(buffer.values()) {}
  const void* data(bool present = true) const { return present ? buffer.data() : nullptr; }
  Vector vector(int64_t rows, bool present = true) const { return {data(present), buffer.dtype, rows}; }
};
