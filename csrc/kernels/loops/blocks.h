// Copies blocks of a tensor, some channels at some positions, to and from scratch memory: rows of positions [channels,
// stride] in the arithmetic type. A position is one of n·s, so that a block may span several samples.
#pragma once

#include <utility>

#include "lanes.h"

namespace BATCHNORM_NAMESPACE {
namespace {

inline constexpr int64_t W = kLanes<A>;

// Exchanges the parts of a and b that are off the diagonal, which have h lanes.
template <int h, class V, size_t... lane>
BATCHNORM_INLINE void exchange(V& a, V& b, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, ((lane & h) != 0 ? lanes + lane - h : lane)...);
  b = __builtin_shufflevector(a, b, ((lane & h) != 0 ? lanes + lane : lane + h)...);
  a = low;
}

// Transposes as many vectors as each has lanes.
template <int h = 1>
BATCHNORM_INLINE void transpose(Vec<A> (&v)[W]) {
  if constexpr (h < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & h) == 0) exchange<h>(v[i], v[i | h], std::make_index_sequence<W>{});
    }
    transpose<2 * h>(v);
  }
}

// Returns the sum of the lanes of each vector. Changes v.
template <int h = 1>
BATCHNORM_INLINE Vec<A> sum_each(Vec<A>* v) {
  if constexpr (h < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * h) {
      exchange<h>(v[i], v[i + h], std::make_index_sequence<W>{});
      v[i] += v[i + h];
    }
    return sum_each<2 * h>(v);
  } else {
    return v[0];
  }
}

// A block in memory: channels [channel, channel + channels) at positions [position, position + positions).
struct Block {
  const Shape& shape;
  int64_t channel, channels, position, positions;

  // Whether the channels of a position are consecutive in memory.
  bool channels_innermost() const { return shape.channels_last || shape.s == 1; }

  // Calls f(channel, offset in memory, position in the block, length) for each consecutive piece of a channel's values.
  template <class F>
  void pieces(const F& f) const {
    for (int64_t i = 0; i < channels; ++i) {
      int64_t sample = position / shape.s, within = position % shape.s;
      for (int64_t done = 0; done < positions; ++sample, within = 0) {
        const int64_t rest = shape.s - within, length = rest < positions - done ? rest : positions - done;
        f(i, (sample * shape.c + channel + i) * shape.s + within, done, length);
        done += length;
      }
    }
  }
};

// rows = x - mean for the block; mean [c] may be null. The rows are filled with zeros up to `padded` positions, and have
// memory for a further packet.
void load_block(const Block& block, const T* x, const A* mean, A* rows, int64_t stride, int64_t padded) {
  const Shape& shape = block.shape;
  constexpr int64_t P = kPacket<T>;
  auto center = [&](int64_t i) { return mean ? mean[block.channel + i] : A(0); };
  if (!block.channels_innermost()) {
    block.pieces([&](int64_t i, int64_t offset, int64_t at, int64_t length) {
      const auto subtracted = broadcast_to<Packet<T>>(center(i));
      const T* from = x + offset;
      A* row = rows + i * stride + at;
      int64_t k = 0;
      for (; k + P <= length; k += P) store(row + k, load(from + k, P) - subtracted, P);
      // The next piece overwrites the values beyond this one.
      if (k < length) store(row + k, load(from + k, length - k) - subtracted, P);
    });
  } else {
    for (int64_t k = 0; k < block.positions; k += W) {
      for (int64_t i = 0; i < block.channels; i += W) {
        Vec<A> v[W];
#pragma GCC unroll 16
        for (int64_t r = 0; r < W; ++r) {
          const int64_t row = k + r < block.positions ? k + r : k;
          const int64_t offset = (block.position + row) * shape.c + block.channel + i;
          const int64_t rest = shape.numel() - offset;
          v[r] = rest >= W ? load_as<Vec<A>>(x + offset, W) : load_as<Vec<A>>(x + offset, rest);
        }
        transpose(v);
#pragma GCC unroll 16
        for (int64_t r = 0; r < W; ++r) {
          if (i + r < block.channels) store(rows + (i + r) * stride + k, v[r] - broadcast(center(i + r)), W);
        }
      }
    }
  }
  for (int64_t i = 0; i < block.channels; ++i) {
    for (int64_t k = block.positions; k < padded; ++k) rows[i * stride + k] = A(0);
  }
}

// Stores rows as the block of y. With `streamed`, bypasses the caches where it can.
void store_block(const Block& block, const A* rows, int64_t stride, T* y, bool streamed) {
  const Shape& shape = block.shape;
  constexpr int64_t P = kPacket<T>;
  if (!block.channels_innermost()) {
    block.pieces([&](int64_t i, int64_t offset, int64_t at, int64_t length) {
      const A* row = rows + i * stride + at;
      T* to = y + offset;
      const bool aligned = streamed && reinterpret_cast<uintptr_t>(to) % kBytes == 0;
      int64_t k = 0;
      for (; k + P <= length; k += P) {
        const auto v = load_as<Packet<T>>(row + k, P);
        aligned ? stream(to + k, v) : store(to + k, v, P);
      }
      if (k == length) return;
      if (length >= P) k = length - P;
      store(to + k, load_as<Packet<T>>(row + k, P), length - k);
    });
    return;
  }
  for (int64_t k = 0; k < block.positions; k += W) {
    for (int64_t i = 0; i < block.channels; i += W) {
      const int64_t count = block.channels - i < W ? block.channels - i : W;
      Vec<A> v[W];
#pragma GCC unroll 16
      for (int64_t r = 0; r < W; ++r) v[r] = r < count ? load(rows + (i + r) * stride + k, W) : Vec<A>{};
      transpose(v);
#pragma GCC unroll 16
      for (int64_t r = 0; r < W; ++r) {
        if (k + r >= block.positions) continue;
        T* to = y + (block.position + k + r) * shape.c + block.channel + i;
        count == W ? store(to, v[r], W) : store(to, v[r], count);
      }
    }
  }
}

}  // namespace
}  // namespace BATCHNORM_NAMESPACE
