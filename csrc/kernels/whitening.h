// Products of deviations, and linear maps of them, in groups of channels. Each block of a group is copied to scratch
// memory, in which the products run along positions whatever the dtype and the memory layout.
#pragma once

#include "kernels/loops/blocks.h"

namespace BATCHNORM_NAMESPACE {
namespace {

// A tile of products is the sums of kRows × kColumns vectors; a tile of a map is kRows rows of kColumns vectors. Both
// fit in the registers: 32 with AVX-512 and on Arm, otherwise 16.
inline constexpr int kRows = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kColumns = 4;
#else
inline constexpr int kColumns = 2;
#endif
inline constexpr int64_t kTile = kRows * kColumns, kMapped = kColumns * W;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// How the channels and positions are divided into blocks and units of work. It depends on the shape only, so that sums
// have the same bits for any number of threads.
struct Division {
  const Shape& shape;
  int64_t positions, size, groups;
  int64_t padded;       // channels of a group, with rows of zeros that complete a tile
  int64_t block;        // positions
  int64_t at_once;      // consecutive groups of a unit
  int64_t chunks;       // units of one part: together, they contain all groups
  int64_t parts;        // consecutive positions

  // A block has `rows` rows in scratch memory. Sums have few parts of many blocks.
  Division(const Shape& shape_, int64_t size_, int64_t rows, bool sums)
      : shape(shape_), positions(shape_.n * shape_.s), size(size_ < shape_.c ? size_ : shape_.c) {
    constexpr int64_t kBlockBytes = 64 << 10, kLongest = 1024, kInnermostChannels = 128, kUnits = 64, kMostParts = 16;
    groups = (shape.c + size - 1) / size;
    padded = round_up(size, kRows);
    block = kBlockBytes / (rows * static_cast<int64_t>(sizeof(A))) / kMapped * kMapped;
    block = block < 2 * kMapped ? 2 * kMapped : block > kLongest ? kLongest : block;
    at_once = shape.channels_last || shape.s == 1 ? (kInnermostChannels + size - 1) / size : 1;
    at_once = at_once < groups ? at_once : groups;
    chunks = (groups + at_once - 1) / at_once;
    const int64_t blocks = (positions + block - 1) / block;
    parts = (kUnits + chunks - 1) / chunks;
    parts = parts < kMostParts ? parts : kMostParts;
    if (!sums || parts > blocks) parts = blocks;
  }
  int64_t channels(int64_t group) const { return group == groups - 1 ? shape.c - group * size : size; }
  int64_t stride() const { return block + 2 * W; }

  // Calls f(part, group, Block) for each block of the units [begin, end).
  template <class F>
  void each(int64_t begin, int64_t end, const F& f) const {
    const int64_t blocks = (positions + block - 1) / block;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit / chunks, first = unit % chunks * at_once;
      for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
        const int64_t position = b * block, rest = positions - position;
        for (int64_t group = first; group < first + at_once && group < groups; ++group) {
          f(part, group, Block{shape, group * size, channels(group), position, rest < block ? rest : block});
        }
      }
    }
  }
  // Runs body(begin, end) on the units.
  template <class Body>
  void run(const Threads& threads, const Body& body) const {
    const int64_t values = positions * shape.c / (parts * chunks);
    parallel(threads, parts * chunks, values > 0 ? values : 1, body);
  }
};

A* zeros(int64_t count, Scratch& scratch) {
  A* values = scratch.get<A>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = A(0);
  return values;
}

// Multiplies each row by the positions' weights.
void weigh(const Block& block, const A* weights, A* rows, int64_t stride) {
  for (int64_t i = 0; i < block.channels; ++i) {
    for (int64_t k = 0; k < block.positions; ++k) rows[i * stride + k] *= weights[block.position + k];
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

// totals += the sums over positions of the products of kRows rows of a and kColumns rows of b.
void add_tile(const A* a, const A* b, int64_t stride, int64_t positions, double* totals) {
  Vec<A> sums[kTile]{};
  for (int64_t k = 0; k < positions; k += W) {
    Vec<A> left[kRows], right[kColumns];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) left[i] = load(a + i * stride + k, W);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * stride + k, W);
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) sums[t] = fma(left[t / kColumns], right[t % kColumns], sums[t]);
  }
#pragma GCC unroll 8
  for (int64_t t = 0; t < kTile; t += W) add_to(totals + t, sum_each(sums + t), W);
}

// The sums of one group: the tiles of its products, row by row, then the sums of its rows.
struct GroupSums {
  int64_t padded;
  int64_t size() const { return padded * (padded + 1); }
  int64_t tile(int64_t i, int64_t j) const { return i / kRows * kRows * padded + j / kColumns * kTile; }
  int64_t at(int64_t i, int64_t j) const { return tile(i, j) + i % kRows * kColumns + j % kColumns; }
  int64_t row(int64_t i) const { return padded * padded + i; }

  // Adds left·rightᵀ and the sums of left. If both are the same rows, only adds the tiles that contain some j ≥ i.
  void add(const A* left, const A* right, int64_t stride, int64_t channels, int64_t positions, double* totals) const {
    for (int64_t i = 0; i < channels; i += kRows) {
      for (int64_t j = left == right ? i : 0; j < channels; j += kColumns) {
        add_tile(left + i * stride, right + j * stride, stride, positions, totals + tile(i, j));
      }
    }
    for (int64_t i = 0; i < channels; ++i) {
      Vec<double> sum{};
      for (int64_t k = 0; k < positions; k += W) sum += wide_sum(load(left + i * stride + k, W));
      totals[row(i)] += sum_lanes(sum);
    }
  }
};

void whiten_products(const Threads& threads, const WhitenProducts& a) {
  const bool same = !a.dy && !a.weights;
  if (a.shape.numel() == 0) {
    const int64_t columns = a.size < a.shape.c ? a.size : a.shape.c;
    for (int64_t i = 0; i < a.shape.c * columns; ++i) a.products[i] = 0.0;
    for (int64_t c = 0; c < a.shape.c; ++c) a.sums[c] = 0.0;
    return;
  }
  const int64_t most = a.size < a.shape.c ? a.size : a.shape.c;
  const Division division(a.shape, a.size, round_up(most, kRows) * (same ? 1 : 2), true);
  const GroupSums sums{division.padded};
  Scratch scratch;
  const int64_t of_part = division.groups * sums.size(), all = division.parts * of_part;
  double* totals = scratch.get<double>(all);
  const A *mean = static_cast<const A*>(a.mean), *weights = static_cast<const A*>(a.weights);
  division.run(threads, [&](int64_t begin, int64_t end) {
    Scratch own;
    const int64_t stride = division.stride();
    A* const right = zeros(division.padded * stride, own);
    A* const left = same ? right : zeros(division.padded * stride, own);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % division.chunks * division.at_once;
      const int64_t last = first + division.at_once < division.groups ? first + division.at_once : division.groups;
      double* own_totals = totals + unit / division.chunks * of_part;
      for (int64_t t = first * sums.size(); t < last * sums.size(); ++t) own_totals[t] = 0.0;
    }
    division.each(begin, end, [&](int64_t part, int64_t group, const Block& block) {
      const int64_t filled = round_up(block.positions, W);
      load_block(block, static_cast<const T*>(a.x), mean, right, stride, filled);
      if (a.dy) {
        load_block(block, static_cast<const T*>(a.dy), nullptr, left, stride, filled);
      } else if (weights) {
        std::memcpy(left, right, static_cast<size_t>(block.channels * stride) * sizeof(A));
        weigh(block, weights, left, stride);
      }
      sums.add(left, right, stride, block.channels, filled, totals + part * of_part + group * sums.size());
    });
  });
  parallel(threads, division.groups, division.parts * sums.size(), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t channels = division.channels(group);
      auto total = [&](int64_t at) {
        double sum = 0.0;
        for (int64_t part = 0; part < division.parts; ++part) sum += totals[part * of_part + group * sums.size() + at];
        return sum;
      };
      for (int64_t i = 0; i < channels; ++i) {
        const int64_t c = group * division.size + i;
        a.sums[c] = total(sums.row(i));
        for (int64_t j = 0; j < division.size; ++j) {
          const bool mirrored = same && j < i;
          a.products[c * division.size + j] = j < channels ? total(mirrored ? sums.at(j, i) : sums.at(i, j)) : 0.0;
        }
      }
    }
  });
}

// ---- maps ----------------------------------------------------------------------------------------------------------

// kRows rows of out = shift + coefficients·rows, at kMapped positions. The coefficients are [terms, kRows].
void map_tile(const A* coefficients, const A* shift, const A* rows, int64_t terms, int64_t stride, A* out) {
  Vec<A> sums[kTile];
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) sums[t] = broadcast(shift[t / kColumns]);
  for (int64_t j = 0; j < terms; ++j) {
    Vec<A> v[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) v[n] = load(rows + j * stride + n * W, W);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> factor = broadcast(coefficients[j * kRows + i]);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sums[i * kColumns + n] = fma(factor, v[n], sums[i * kColumns + n]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) store(out + t / kColumns * stride + t % kColumns * W, sums[t], W);
}

// The coefficients of each group, [padded / kRows, terms, kRows], and the constants, [padded]. The terms of a group are
// its channels of x, those of dy, and the weights, which multiply the shift.
struct MapCoefficients {
  const WhitenMap& args;
  const Division& division;
  int64_t terms;
  A *values, *constants;

  MapCoefficients(const WhitenMap& a, const Division& d, const Threads& threads, Scratch& scratch)
      : args(a), division(d), terms(d.size * (a.dy ? 2 : 1) + (a.weights ? 1 : 0)) {
    values = scratch.get<A>(division.groups * of_group());
    constants = scratch.get<A>(division.groups * division.padded);
    parallel(threads, division.groups, of_group(), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) fill(group);
    });
  }
  int64_t of_group() const { return division.padded * terms; }

  void fill(int64_t group) const {
    const int64_t channels = division.channels(group), size = division.size;
    const A *matrices = static_cast<const A*>(args.matrices), *of_dy = static_cast<const A*>(args.dy_matrices);
    const A* shift = static_cast<const A*>(args.shift);
    for (int64_t i = 0; i < division.padded; ++i) {
      const bool present = i < channels;
      const int64_t c = group * size + i;
      A* to = values + group * of_group() + i / kRows * kRows * terms + i % kRows;
      auto next = [&](A value) { *to = value, to += kRows; };
      for (int64_t j = 0; j < channels; ++j) next(present ? matrices[c * size + j] : A(0));
      for (int64_t j = 0; of_dy && j < channels; ++j) next(present ? of_dy[c * size + j] : A(0));
      const A constant = present ? shift[c] : A(0);
      if (args.weights) next(constant);
      constants[group * division.padded + i] = args.weights ? A(0) : constant;
    }
  }
};

void whiten_map(const Threads& threads, const WhitenMap& a) {
    if (a.shape.numel() == 0) return;
  const int64_t most = a.size < a.shape.c ? a.size : a.shape.c;
  const Division division(a.shape, a.size, most * (a.dy ? 3 : 2), false);
  Scratch scratch;
  const MapCoefficients map(a, division, threads, scratch);
  const A *mean = static_cast<const A*>(a.mean), *weights = static_cast<const A*>(a.weights);
  const bool streamed = streams(a.shape);
  division.run(threads, [&](int64_t begin, int64_t end) {
    Scratch own;
    const int64_t stride = division.stride();
    A* const rows = zeros(map.terms * stride, own);
    A* const out = zeros(division.padded * stride, own);
    division.each(begin, end, [&](int64_t, int64_t group, const Block& block) {
      const int64_t filled = round_up(block.positions, kMapped);
      A* next = rows;
      auto load_next = [&](const void* from, const A* subtracted) {
        load_block(block, static_cast<const T*>(from), subtracted, next, stride, filled);
        next += block.channels * stride;
      };
      load_next(a.x, mean);
      if (weights) weigh(block, weights, rows, stride);
      if (a.dy) load_next(a.dy, nullptr);
      if (weights) {
        for (int64_t k = 0; k < filled; ++k) next[k] = k < block.positions ? weights[block.position + k] : A(0);
        next += stride;
      }
      const int64_t terms = (next - rows) / stride;
      const A* coefficients = map.values + group * map.of_group();
      const A* constants = map.constants + group * division.padded;
      for (int64_t i = 0; i < block.channels; i += kRows) {
        for (int64_t k = 0; k < filled; k += kMapped) {
          map_tile(coefficients + i * map.terms, constants + i, rows + k, terms, stride, out + i * stride + k);
        }
      }
      store_block(block, out, stride, static_cast<T*>(a.y), streamed);
    });
    if (streamed) stream_fence();
  });
}

}  // namespace
}  // namespace BATCHNORM_NAMESPACE
