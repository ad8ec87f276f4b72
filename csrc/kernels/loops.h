// The hot loops: a term or map over rows in memory. They are compiled per term and called through pointers, so the
// drivers that call them are compiled once. Each body appears twice: for full vectors and for the remainder.
#pragma once

#include "plane_loops.h"

namespace BATCHNORM_NAMESPACE {

// ---- rows of lanes: each lane is a channel; several lanes may share one ---------------------------------------------

// u[0 .. count) += Σ u and uv[0 .. count) += Σ u·v of one vector of lanes, which may be partial.
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

// u[j - j0] += Σ u and uv[j - j0] += Σ u·v of lanes [j0, j1) over rows [r0, r1). Coefficients start at `channel0`.
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
  constexpr int64_t kTile = 64;  // vectors of lanes whose sums stay in the first cache
  // A line holds two vectors of a half type, so two rows at a time halve the traffic of the sums. Wider types are
  // faster one row at a time.
  constexpr bool kTwoRows = sizeof(typename Term::Type) < 4;
  constexpr int64_t kPerLine = W * sizeof(typename Term::Type) < 64 ? 64 / (W * sizeof(typename Term::Type)) : 1;
  for (int64_t block = r0; block < r1; block += kAdditions) {
    const int64_t block_end = r1 - block < kAdditions ? r1 : block + kAdditions;
    int64_t j = j0;
    if (j1 - j0 == 4 * W) {  // the sums stay in registers
      const auto c0 = term.at(ManyChannels<A>{channel0 + j, W});
      const auto c1 = term.at(ManyChannels<A>{channel0 + j + W, W});
      const auto c2 = term.at(ManyChannels<A>{channel0 + j + 2 * W, W});
      const auto c3 = term.at(ManyChannels<A>{channel0 + j + 3 * W, W});
      V a0{}, b0{}, a1{}, b1{}, a2{}, b2{}, a3{}, b3{};
      for (int64_t row = block; row < block_end; ++row) {
        fetch_lines<1>(term, row * lanes + j + kAhead<Term>, 4 * W);
        step(c0, row, j, W, a0, b0);
        step(c1, row, j + W, W, a1, b1);
        step(c2, row, j + 2 * W, W, a2, b2);
        step(c3, row, j + 3 * W, W, a3, b3);
      }
      add_to(u_sums, a0, W), add_to(u_sums + W, a1, W), add_to(u_sums + 2 * W, a2, W), add_to(u_sums + 3 * W, a3, W);
      add_to(uv_sums, b0, W), add_to(uv_sums + W, b1, W);
      add_to(uv_sums + 2 * W, b2, W), add_to(uv_sums + 3 * W, b3, W);
      continue;
    }
    while (j + W <= j1) {  // row by row, because memory is read fastest in this order
      const int64_t vectors = (j1 - j) / W < kTile ? (j1 - j) / W : kTile;
      V sums[kTile][2];  // adjacent, because the processor confuses addresses that are 4 KB apart
      for (int64_t v = 0; v < vectors; ++v) sums[v][0] = sums[v][1] = V{};
      int64_t row = block;
      for (; kTwoRows && row + 2 <= block_end; row += 2) {
        const int64_t first = row * lanes + j, second = first + lanes;
        for (int64_t v = 0; v < vectors; ++v) {
          if (v % kPerLine == 0) {
            term.template fetch<1>(first + v * W + kAhead<Term>);
            term.template fetch<1>(second + v * W + kAhead<Term>);
          }
          const auto c = term.at(ManyChannels<A>{channel0 + j + v * W, W});
          V a = sums[v][0], b = sums[v][1];
          step(c, row, j + v * W, W, a, b);
          step(c, row + 1, j + v * W, W, a, b);
          sums[v][0] = a, sums[v][1] = b;
        }
      }
      for (; row < block_end; ++row) {
        for (int64_t v = 0; v < vectors; ++v) {
          if (v % kPerLine == 0) term.template fetch<1>(row * lanes + j + v * W + kAhead<Term>);
          step(term.at(ManyChannels<A>{channel0 + j + v * W, W}), row, j + v * W, W, sums[v][0], sums[v][1]);
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        add_to(u_sums + (j - j0) + v * W, sums[v][0], W);
        add_to(uv_sums + (j - j0) + v * W, sums[v][1], W);
      }
      j += vectors * W;
    }
    if (j < j1) {
      reduce_some(*static_cast<const Term*>(self), lanes, block, block_end, j, j1 - j, channel0 + j, u_sums + (j - j0),
                  uv_sums + (j - j0));
    }
  }
}

// Maps lanes [j, j + count) of a row, fewer than a full vector.
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

// ---- terms and maps as values ---------------------------------------------------------------------------------------

struct Reducer {
  const void* term;
  ReducePlanes planes;
  ReduceRows rows;
};

struct Mapper {
  const void* map = nullptr;  // null if there is no map
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
