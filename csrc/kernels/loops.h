// The hot loops: a term or map over rows in memory. Compiled per term, and called through pointers, so that the
// drivers above them are compiled once. Each body appears twice: for full vectors, and for what is left over.
#pragma once

#include "kernels.h"
#include "terms.h"

namespace BATCHNORM_NAMESPACE {

inline constexpr int64_t kChannelsAtOnce = 128;  // planes: channels summed together

// Additions in a row in the arithmetic's own precision; what they sum is then added in float64.
inline constexpr int64_t kAdditions = 32;

// Σ u and Σ u·v in float64, in as many partial sums as a vector has lanes.
struct WideSums {
  Vec<double> u{}, uv{};
};

// A mask of lanes [from, to).
BATCHNORM_INLINE auto lanes_between(int64_t from, int64_t to, float) {
  Int32 lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  return (lane >= static_cast<int32_t>(from)) & (lane < static_cast<int32_t>(to));
}
BATCHNORM_INLINE auto lanes_between(int64_t from, int64_t to, double) {
  Vec<int64_t> lane;
  for (int i = 0; i < kLanes<double>; ++i) lane[i] = i;
  return (lane >= from) & (lane < to);
}

// ---- planes: [n, c, s] in memory, a row is s values of one channel
// ---------------------------------------------------

// a += Σ u and b += Σ u·v over `length` values from `offset`; `position` is where their weights begin.
template <class Term>
BATCHNORM_INLINE void reduce_row(const Term& term, const typename Term::Loaded& c, int64_t offset, int64_t position,
                                 int64_t length, Vec<typename Term::A>& a, Vec<typename Term::A>& b) {
  using A = typename Term::A;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  auto step = [&](int64_t i, V & sum_u, V & sum_uv) __attribute__((always_inline)) {
    V u, v;
    term.pair(c, offset + i, W, term.weights ? load(term.weights + position + i, W) : V{}, u, v);
    sum_u = sum_u + u;
    sum_uv = fma(u, v, sum_uv);
  };
  int64_t i = 0;
  if (length >= 4 * W) {  // four chains of additions
    V a1{}, b1{}, a2{}, b2{}, a3{}, b3{};
    for (; i + 4 * W <= length; i += 4 * W) {
      step(i, a, b);
      step(i + W, a1, b1);
      step(i + 2 * W, a2, b2);
      step(i + 3 * W, a3, b3);
    }
    a = (a + a1) + (a2 + a3);
    b = (b + b1) + (b2 + b3);
  }
  for (; i + W <= length; i += W) step(i, a, b);
  if (i < length) {  // the last full vector again, without the lanes already summed
    V u, v;
    const int64_t start = length - W;
    term.pair(c, offset + start, W, term.weights ? load(term.weights + position + start, W) : V{}, u, v);
    const auto fresh = lanes_between(i - start, W, A{});
    u = select(fresh, u, V{});
    v = select(fresh, v, V{});
    a = a + u;
    b = fma(u, v, b);
  }
}

// The same for a row shorter than a vector.
template <class Term>
__attribute__((noinline)) static void reduce_short_row(const Term& term, int64_t channel, int64_t offset,
                                                       int64_t position, int64_t length, Vec<typename Term::A>& a,
                                                       Vec<typename Term::A>& b) {
  using A = typename Term::A;
  using V = Vec<A>;
  V u, v;
  term.pair(term.at(OneChannel<A>{channel}), offset, length, term.weights ? load(term.weights + position, length) : V{},
            u, v);
  const auto present = lanes_between(0, length, A{});
  u = select(present, u, V{});
  v = select(present, v, V{});
  a = a + u;
  b = fma(u, v, b);
}

// Adds to sums[0 .. channels) those of values [begin, begin + length) of samples [n0, n1), channels from c0.
// `rows`, where given, names each sample's row of coefficients.
using ReducePlanes = void (*)(const void* term, const Shape& s, int64_t n0, int64_t n1, int64_t begin, int64_t length,
                              int64_t c0, int64_t channels, const int64_t* rows, WideSums* sums);

template <class Term>
static void reduce_planes(const void* self, const Shape& s, int64_t n0, int64_t n1, int64_t begin, int64_t length,
                          int64_t c0, int64_t channels, const int64_t* rows, WideSums* sums) {
  using A = typename Term::A;
  const Term term = *static_cast<const Term*>(self);
  Vec<A> a[kChannelsAtOnce], b[kChannelsAtOnce];
  for (int64_t k = 0; k < channels; ++k) a[k] = b[k] = Vec<A>{};
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t row = rows ? rows[n] : 0;
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t channel = row * s.c + c0 + k, offset = (n * s.c + c0 + k) * s.s + begin;
      if (length >= kLanes<A>) {
        Vec<A> sum_u = a[k], sum_uv = b[k];
        reduce_row(term, term.at(OneChannel<A>{channel}), offset, n * s.s + begin, length, sum_u, sum_uv);
        a[k] = sum_u, b[k] = sum_uv;
      } else {
        reduce_short_row(*static_cast<const Term*>(self), channel, offset, n * s.s + begin, length, a[k], b[k]);
      }
    }
  }
  for (int64_t k = 0; k < channels; ++k) {
    sums[k].u = sums[k].u + wide_sum(a[k]);
    sums[k].uv = sums[k].uv + wide_sum(b[k]);
  }
}

// Maps part of one row: of values that do not fill a vector, or not an aligned one.
template <class Map>
__attribute__((noinline)) static void map_some(const Map& map, int64_t channel, int64_t offset, int64_t position,
                                               int64_t count) {
  using A = typename Map::A;
  map.apply(map.at(OneChannel<A>{channel}), offset, count, map.weights ? load(map.weights + position, count) : Vec<A>{},
            false);
}

// Maps values [begin, begin + length) of `channels` channels from c0 of sample n, with the coefficients of row `row`.
// Meanwhile the inputs that lie `ahead` values further on are fetched; 0: none.
using MapPlanes = void (*)(const void* map, const Shape& s, int64_t n, int64_t c0, int64_t channels, int64_t begin,
                           int64_t length, int64_t row, bool streamed, int64_t ahead);

template <class Map>
static void map_planes(const void* self, const Shape& s, int64_t n, int64_t c0, int64_t channels, int64_t begin,
                       int64_t length, int64_t row, bool streamed, int64_t ahead) {
  using A = typename Map::A;
  using T = typename Map::Type;
  constexpr int64_t W = kLanes<A>, kLine = 64 / sizeof(T);
  const Map& original = *static_cast<const Map*>(self);
  const Map map = original;
  const int64_t position = n * s.s + begin;
  for (int64_t k = c0; k < c0 + channels; ++k) {
    const int64_t channel = row * s.c + k, offset = (n * s.c + k) * s.s + begin;
    int64_t i = 0;
    bool past = streamed;
    if (past) {  // first up to where the output is aligned
      const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.first_output() + offset) / sizeof(T));
      const int64_t head = (kLine - at % kLine) % kLine;
      past = head + W <= length;
      for (; past && i < head; i += W) map_some(original, channel, offset + i, position + i, W);
      if (past) i = head;
    }
    const auto c = map.at(OneChannel<A>{channel});
#pragma GCC unroll 4
    for (; i + W <= length; i += W) {
      if (ahead) map.fetch(offset + i + ahead);
      map.apply(c, offset + i, W, map.weights ? load(map.weights + position + i, W) : Vec<A>{}, past);
    }
    if (i < length && length >= W) {  // the last full vector again
      i = length - W;
      map.apply(c, offset + i, W, map.weights ? load(map.weights + position + i, W) : Vec<A>{}, false);
    } else if (i < length) {
      map_some(original, channel, offset, position, length);
    }
  }
}

// ---- rows of lanes: each lane is a channel, or one of a few of the same
// ----------------------------------------------

// u[0 .. count) += Σ u and uv[0 .. count) += Σ u·v of one vector of lanes, which need not be full.
template <class Term>
__attribute__((noinline)) static void reduce_some(const Term& term, int64_t lanes, int64_t r0, int64_t r1, int64_t j,
                                                  int64_t count, int64_t channel, double* u_sums, double* uv_sums) {
  using A = typename Term::A;
  using V = Vec<A>;
  const auto c = term.at(ManyChannels<A>{channel, count});
  V a{}, b{}, u, v;
  for (int64_t row = r0; row < r1; ++row) {
    term.pair(c, row * lanes + j, count, term.weights ? broadcast(term.weights[row]) : V{}, u, v);
    a = a + u;
    b = fma(u, v, b);
  }
  add_to(u_sums, a, count);
  add_to(uv_sums, b, count);
}

// u[j - j0] += Σ u and uv[j - j0] += Σ u·v of lanes [j0, j1) over rows [r0, r1). Coefficients begin at `channel0`.
using ReduceRows = void (*)(const void* term, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1,
                            int64_t channel0, double* u, double* uv);

template <class Term>
static void reduce_rows(const void* self, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1,
                        int64_t channel0, double* u_sums, double* uv_sums) {
  using A = typename Term::A;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  const Term term = *static_cast<const Term*>(self);
  auto step = [&](const typename Term::Loaded& c, int64_t row, int64_t j, int64_t count, V& a, V& b)
      __attribute__((always_inline)) {
    V u, v;
    term.pair(c, row * lanes + j, count, term.weights ? broadcast(term.weights[row]) : V{}, u, v);
    a = a + u;
    b = fma(u, v, b);
  };
  for (int64_t block = r0; block < r1; block += kAdditions) {
    const int64_t block_end = r1 - block < kAdditions ? r1 : block + kAdditions;
    int64_t j = j0;
    for (; j + 4 * W <= j1; j += 4 * W) {  // four vectors of lanes, their sums in registers
      const auto c0 = term.at(ManyChannels<A>{channel0 + j, W});
      const auto c1 = term.at(ManyChannels<A>{channel0 + j + W, W});
      const auto c2 = term.at(ManyChannels<A>{channel0 + j + 2 * W, W});
      const auto c3 = term.at(ManyChannels<A>{channel0 + j + 3 * W, W});
      V a0{}, b0{}, a1{}, b1{}, a2{}, b2{}, a3{}, b3{};
      for (int64_t row = block; row < block_end; ++row) {
        step(c0, row, j, W, a0, b0);
        step(c1, row, j + W, W, a1, b1);
        step(c2, row, j + 2 * W, W, a2, b2);
        step(c3, row, j + 3 * W, W, a3, b3);
      }
      double *u = u_sums + (j - j0), *uv = uv_sums + (j - j0);
      add_to(u, a0, W), add_to(u + W, a1, W), add_to(u + 2 * W, a2, W), add_to(u + 3 * W, a3, W);
      add_to(uv, b0, W), add_to(uv + W, b1, W), add_to(uv + 2 * W, b2, W), add_to(uv + 3 * W, b3, W);
    }
    for (; j < j1; j += W) {
      const int64_t count = j1 - j < W ? j1 - j : W;
      reduce_some(*static_cast<const Term*>(self), lanes, block, block_end, j, count, channel0 + j, u_sums + (j - j0),
                  uv_sums + (j - j0));
    }
  }
}

// Maps `count` lanes of a row from j, fewer than a vector has.
template <class Map>
__attribute__((noinline)) static void map_some_lanes(const Map& map, int64_t lanes, int64_t row, int64_t j,
                                                     int64_t count, int64_t channel) {
  using A = typename Map::A;
  map.apply(map.at(ManyChannels<A>{channel, count}), row * lanes + j, count,
            map.weights ? broadcast(map.weights[row]) : Vec<A>{}, false);
}

// Maps lanes [j0, j1) of rows [r0, r1).
using MapRows = void (*)(const void* map, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1,
                         int64_t channel0, bool streamed);

template <class Map>
static void map_rows(const void* self, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1, int64_t channel0,
                     bool streamed) {
  using A = typename Map::A;
  constexpr int64_t W = kLanes<A>;
  const Map map = *static_cast<const Map*>(self);
  auto step = [&](const typename Map::Loaded& c, int64_t row, int64_t j) __attribute__((always_inline)) {
    map.apply(c, row * lanes + j, W, map.weights ? broadcast(map.weights[row]) : Vec<A>{}, streamed);
  };
  if (j1 - j0 == 4 * W) {  // coefficients stay in registers
    const auto c0 = map.at(ManyChannels<A>{channel0 + j0, W});
    const auto c1 = map.at(ManyChannels<A>{channel0 + j0 + W, W});
    const auto c2 = map.at(ManyChannels<A>{channel0 + j0 + 2 * W, W});
    const auto c3 = map.at(ManyChannels<A>{channel0 + j0 + 3 * W, W});
    for (int64_t row = r0; row < r1; ++row) {
      step(c0, row, j0);
      step(c1, row, j0 + W);
      step(c2, row, j0 + 2 * W);
      step(c3, row, j0 + 3 * W);
    }
    return;
  }
  for (int64_t row = r0; row < r1; ++row) {
    int64_t j = j0;
    for (; j + W <= j1; j += W) step(map.at(ManyChannels<A>{channel0 + j, W}), row, j);
    if (j < j1) map_some_lanes(*static_cast<const Map*>(self), lanes, row, j, j1 - j, channel0 + j);
  }
}

// ---- terms and maps as values
// ----------------------------------------------------------------------------------------

struct Reducer {
  const void* term;
  ReducePlanes planes;
  ReduceRows rows;
};

struct Mapper {
  const void* map = nullptr;  // null: nothing is mapped
  MapPlanes planes = nullptr;
  MapRows rows = nullptr;
  const void* output = nullptr;
};

template <class Term>
static Reducer reducer(const Term& term) {
  return {&term, reduce_planes<Term>, reduce_rows<Term>};
}

template <class Map>
static Mapper mapper(const Map& map) {
  return {&map, map_planes<Map>, map_rows<Map>, map.first_output()};
}

}  // namespace BATCHNORM_NAMESPACE
