// The hot loops: a term or map over rows in memory. They are compiled per term and called through pointers, so the
// drivers that call them are compiled once. Each body appears twice: for full vectors and for the remainder.
#pragma once

#include "columns.h"
#include "plane_loops.h"

namespace BATCHNORM_NAMESPACE {

// ---- rows of lanes: each lane is a channel; several lanes may share one ---------------------------------------------

// u[0 .. count) += Σ u and uv[0 .. count) += Σ u·v of one vector of lanes, which may be partial.
template <class Term>
__attribute__((noinline)) static void reduce_some(const Term& term, int64_t lanes, int64_t r0, int64_t r1, int64_t j,
                                                  int64_t count, int64_t channel, double* u_sums, double* uv_sums) {
  using T = typename Term::Type;
  using V = Packet<T>;
  const auto c = term.at(ManyChannels<V>{channel, count});
  V a{}, b{}, u, v;
  for (int64_t row = r0; row < r1; ++row) {
    term.pair(c, row * lanes + j, count, term.weights ? broadcast_to<V>(term.weights[row]) : V{}, u, v);
    a = a + u;
    b = fma(u, v, b);
  }
  add_to(u_sums, a, count);
  add_to(uv_sums, b, count);
}

// u[0 .. packets·W) += Σ u and uv[..] += Σ u·v of a column of `packets` packets from lane j. The sums stay in registers.
// Meanwhile, as many values are prefetched from `next`, in the order of memory, which the processor reads fastest. If
// `last`, the first `skipped` lanes have been summed before.
template <int64_t packets, bool last, class Term>
BATCHNORM_INLINE void reduce_column(const Term& term, int64_t lanes, int64_t r0, int64_t r1, int64_t j, int64_t channel,
                                    int64_t skipped, int64_t& next, double* u_sums, double* uv_sums) {
  using T = typename Term::Type;
  using V = Packet<T>;
  constexpr int64_t W = kPacket<T>, kRowsAhead = 4;
  typename Term::template Loaded<V> c[packets];
  V a[packets]{}, b[packets]{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < packets; ++k) c[k] = term.at(ManyChannels<V>{channel + k * W, W});
  const auto fresh = lanes_between<V>(skipped, W);
  for (int64_t row = r0; row < r1; ++row, next += packets * W) {
    fetch_lines<2>(term, next, packets * W);
    fetch_lines<1>(term, (row + kRowsAhead) * lanes + j, packets * W);
#pragma GCC unroll 4
    for (int64_t k = 0; k < packets; ++k) {
      V u, v;
      term.pair(c[k], row * lanes + j + k * W, W, term.weights ? broadcast_to<V>(term.weights[row]) : V{}, u, v);
      if constexpr (last) u = select(fresh, u, V{}), v = select(fresh, v, V{});
      a[k] = a[k] + u;
      b[k] = fma(u, v, b[k]);
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < packets; ++k) add_to(u_sums + k * W, a[k], W), add_to(uv_sums + k * W, b[k], W);
}

// u[j - j0] += Σ u and uv[j - j0] += Σ u·v of lanes [j0, j1) over rows [r0, r1). Coefficients start at `channel0`.
using ReduceRows = void (*)(const void* term, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1,
                            int64_t channel0, double* u, double* uv);

template <class Term>
static void reduce_rows(const void* self, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1,
                        int64_t channel0, double* u_sums, double* uv_sums) {
  using T = typename Term::Type;
  constexpr int64_t W = kPacket<T>, kTogether = 4 * kLanes<typename Term::A>;
  const Term term = *static_cast<const Term*>(self);
  for (int64_t block = r0; block < r1; block += kAdditions) {
    const int64_t end = r1 - block < kAdditions ? r1 : block + kAdditions, size = (end - block) * lanes;
    int64_t j = j0, next = block * lanes + (size > kAhead<Term> ? size : kAhead<Term>);
    double *u = u_sums, *uv = uv_sums;
    for (; j + kTogether <= j1; j += kTogether, u += kTogether, uv += kTogether) {
      reduce_column<kTogether / W, false>(term, lanes, block, end, j, channel0 + j, 0, next, u, uv);
    }
    for (; j + W <= j1; j += W, u += W, uv += W) {
      reduce_column<1, false>(term, lanes, block, end, j, channel0 + j, 0, next, u, uv);
    }
    if (j == j1) continue;
    if (const int64_t back = W - (j1 - j); back <= j - j0) {  // the last full packet
      reduce_column<1, true>(term, lanes, block, end, j - back, channel0 + j - back, back, next, u - back, uv - back);
    } else {
      reduce_some(*static_cast<const Term*>(self), lanes, block, end, j, j1 - j, channel0 + j, u, uv);
    }
  }
}

// Maps lanes [j, j + count) of a row, fewer than a full vector.
template <class Map>
__attribute__((noinline)) static void map_some_lanes(const Map& map, int64_t lanes, int64_t row, int64_t j,
                                                     int64_t count, int64_t channel) {
  using V = Packet<typename Map::Type>;
  map.apply(map.at(ManyChannels<V>{channel, count}), row * lanes + j, count,
            map.weights ? broadcast_to<V>(map.weights[row]) : V{}, false);
}

// The coefficients of longer rows do not stay in the first-level cache, so they are loaded once for four rows.
inline constexpr int64_t kLongRow = 1024;

// Maps lanes [j0, j1) of rows [r0, r1).
using MapRows = void (*)(const void* map, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1,
                         int64_t channel0, bool streamed);

template <class Map>
static void map_rows(const void* self, int64_t lanes, int64_t r0, int64_t r1, int64_t j0, int64_t j1, int64_t channel0,
                     bool streamed) {
  using V = Packet<typename Map::Type>;
  constexpr int64_t W = kValuesIn<V>, kTogether = 4 * kLanes<typename Map::A>;
  const Map map = *static_cast<const Map*>(self);
  auto step = [&](const typename Map::template Loaded<V>& c, int64_t row, int64_t j) __attribute__((always_inline)) {
    map.apply(c, row * lanes + j, W, map.weights ? broadcast_to<V>(map.weights[row]) : V{}, streamed);
  };
  if (j1 - j0 == kTogether) {  // coefficients stay in registers
    constexpr int64_t kPackets = kTogether / W;
    typename Map::template Loaded<V> c[kPackets];
#pragma GCC unroll 4
    for (int64_t k = 0; k < kPackets; ++k) c[k] = map.at(ManyChannels<V>{channel0 + j0 + k * W, W});
    for (int64_t row = r0; row < r1; ++row) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < kPackets; ++k) step(c[k], row, j0 + k * W);
    }
    return;
  }
  auto map_together = [&](auto constant, int64_t row) __attribute__((always_inline)) {
    constexpr int64_t kRows = decltype(constant)::value;
    auto packet = [&](int64_t j) __attribute__((always_inline)) {
      const auto c = map.at(ManyChannels<V>{channel0 + j, W});
#pragma GCC unroll 4
      for (int64_t k = 0; k < kRows; ++k) step(c, row + k, j);
    };
    int64_t j = j0;
    for (; j + W <= j1; j += W) packet(j);
    if (j == j1) return;
    if (j1 - j0 >= W) return packet(j1 - W);  // the last full packet again
    for (int64_t k = 0; k < kRows; ++k) map_some_lanes(map, lanes, row + k, j, j1 - j, channel0 + j);
  };
  int64_t row = r0;
  if (j1 - j0 > kLongRow) {
    for (; row + 4 <= r1; row += 4) map_together(Constant<int64_t, 4>{}, row);
  }
  for (; row < r1; ++row) map_together(Constant<int64_t, 1>{}, row);
}

// ---- terms and maps as values ---------------------------------------------------------------------------------------

struct Reducer {
  const void* term;
  ReducePlanes planes;
  ReduceRows rows;
  ReduceColumns columns;  // null with weights
};

struct Mapper {
  const void* map = nullptr;  // null if there is no map
  MapPlanes planes = nullptr;
  MapRows rows = nullptr;
  MapColumns columns = nullptr;  // null with weights
  const void* output = nullptr;
};

template <class Term>
static Reducer reducer(const Term& term) {
  return {&term, reduce_planes<Term>, reduce_rows<Term>, term.weights ? nullptr : reduce_columns<Term>};
}

template <class Map>
static Mapper mapper(const Map& map) {
  return {&map, map_planes<Map>, map_rows<Map>, map.weights ? nullptr : map_columns<Map>, map.first_output()};
}

}  // namespace BATCHNORM_NAMESPACE
