// The hot loops: a term or map over rows in memory. They are compiled per term and called through pointers, so the
// drivers that call them are compiled once. Each body appears twice: for full vectors and for the remainder.
#pragma once

#include "kernels.h"
#include "terms.h"

namespace BATCHNORM_NAMESPACE {

inline constexpr int64_t kChannelsAtOnce = 128;  // planes: channels summed together

// The number of consecutive additions in the arithmetic type; their sum is then added in float64.
inline constexpr int64_t kAdditions = 32;

// The part of a core's own cache that holds values that are read twice. The same amount is prefetched.
inline constexpr int64_t kCacheBytes = 512 << 10;

// The values that sums prefetch, in bytes, together for all inputs: half of a first-level cache. Processors also
// prefetch, but restart after every jump. This prefetch reads short rows and many lanes a third faster, but long rows
// and inputs that are already in the cache slower.
inline constexpr int64_t kFetchBytes = 16384, kLongRowBytes = 8192;
template <class Term>
inline constexpr int64_t kValueBytes = Term::kInputs * static_cast<int64_t>(sizeof(typename Term::Type));
template <class Term>
inline constexpr int64_t kAhead = kFetchBytes / kValueBytes<Term>;

// Σ u and Σ u·v in float64, with one partial sum per lane.
struct WideSums {
  Vec<double> u{}, uv{};
};

// Returns a mask of lanes [from, to).
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

// Prefetches [offset, offset + count), line by line.
template <int cache, class Term>
BATCHNORM_INLINE void fetch_lines(const Term& term, int64_t offset, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(typename Term::Type);
  for (int64_t i = 0; i < count; i += kLine) term.template fetch<cache>(offset + i);
}

// ---- planes: [n, c, s] in memory, a row is s values of one channel --------------------------------------------------

// The last vector of a row whose length is no multiple of a vector: where it starts, and the lanes that no other vector
// has. In a row shorter than a vector, it starts with the row and goes beyond its end.
template <class A>
struct LastVector {
  int64_t start, whole;  // the vectors before it have `whole` values
  decltype(lanes_between(0, 0, A{})) fresh;
  explicit LastVector(int64_t length)
      : start(length < kLanes<A> ? 0 : length - kLanes<A>),
        whole(length / kLanes<A> * kLanes<A>),
        fresh(lanes_between(whole - start, length - start, A{})) {}
};

// a += Σ u and b += Σ u·v over `length` values from `offset`; their weights start at `position`. Also prefetches the
// values `ahead` positions later, or none if `ahead` is 0.
template <class Term>
BATCHNORM_INLINE void reduce_row(const Term& term, const typename Term::Loaded& c, int64_t offset, int64_t position,
                                 int64_t length, const LastVector<typename Term::A>& last, int64_t ahead,
                                 Vec<typename Term::A>& a, Vec<typename Term::A>& b) {
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
      if (ahead) fetch_lines<1>(term, offset + i + ahead, 4 * W);
      step(i, a, b);
      step(i + W, a1, b1);
      step(i + 2 * W, a2, b2);
      step(i + 3 * W, a3, b3);
    }
    a = (a + a1) + (a2 + a3);
    b = (b + b1) + (b2 + b3);
  }
  if (ahead) fetch_lines<1>(term, offset + i + ahead, length - i);
  for (; i < last.whole; i += W) step(i, a, b);
  if (i < length) {
    V u, v;
    term.pair(c, offset + last.start, W, term.weights ? load(term.weights + position + last.start, W) : V{}, u, v);
    u = select(last.fresh, u, V{});
    v = select(last.fresh, v, V{});
    a = a + u;
    b = fma(u, v, b);
  }
}

// The same for a row shorter than a vector, without reading beyond its end.
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

// Adds the sums of values [begin, begin + length) of samples [n0, n1) to sums[0 .. channels), for channels from c0.
// `rows`, if given, holds each sample's row of coefficients.
using ReducePlanes = void (*)(const void* term, const Shape& s, int64_t n0, int64_t n1, int64_t begin, int64_t length,
                              int64_t c0, int64_t channels, const int64_t* rows, WideSums* sums);

template <class Term>
static void reduce_planes(const void* self, const Shape& s, int64_t n0, int64_t n1, int64_t begin, int64_t length,
                          int64_t c0, int64_t channels, const int64_t* rows, WideSums* sums) {
  using A = typename Term::A;
  const Term term = *static_cast<const Term*>(self);
  Vec<A> a[kChannelsAtOnce], b[kChannelsAtOnce];
  for (int64_t k = 0; k < channels; ++k) a[k] = b[k] = Vec<A>{};
  // The rows of a sample are contiguous; near their end, prefetch those of the next sample or a later one.
  const int64_t run = channels * length, jump = s.c * s.s, distance = kAhead<Term>;
  const int64_t after = run > distance ? jump + distance - run : jump * (distance / run);
  const bool fetches = s.s * static_cast<int64_t>(sizeof(typename Term::Type)) < kLongRowBytes &&
                       s.numel() * kValueBytes<Term> > kCacheBytes;
  const LastVector<A> last(length);
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t row = rows ? rows[n] : 0;
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t channel = row * s.c + c0 + k, offset = (n * s.c + c0 + k) * s.s + begin;
      if (length >= kLanes<A> || (!term.weights && offset + kLanes<A> <= s.numel())) {
        Vec<A> sum_u = a[k], sum_uv = b[k];
        reduce_row(term, term.at(OneChannel<A>{channel}), offset, n * s.s + begin, length, last,
                   !fetches ? 0 : (k + 1) * length + distance <= run ? distance : after, sum_u, sum_uv);
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

// Maps values [i, end) of contiguous rows of `length` from `offset`, channel by channel. Never writes outside this
// range.
template <class Map>
__attribute__((noinline)) static void map_some(const Map& map, int64_t channel, int64_t offset, int64_t position,
                                               int64_t length, int64_t i, int64_t end) {
  using A = typename Map::A;
  constexpr int64_t W = kLanes<A>;
  while (i < end) {
    const int64_t k = i / length, row_end = (k + 1) * length < end ? (k + 1) * length : end;
    const int64_t count = row_end - i < W ? row_end - i : W;
    map.apply(map.at(OneChannel<A>{channel + k}), offset + i, count,
              map.weights ? load(map.weights + position + (i - k * length), count) : Vec<A>{}, false);
    i += count;
  }
}

// The same in full vectors, as many as fit, of rows that have at least half a vector and no weights. Returns the end of
// the last one.
template <class Map>
__attribute__((noinline)) static int64_t map_narrow(const Map& original, int64_t channel, int64_t channels,
                                                    int64_t offset, int64_t length, int64_t i, int64_t end,
                                                    bool streamed) {
  using A = typename Map::A;
  constexpr int64_t W = kLanes<A>;
  const Map map = original;
  for (; i + W <= end; i += W) {
    const int64_t k = i / length, first = (k + 1) * length - i;
    const ThreeChannels<A> c{channel + k, channel + channels - 1, lanes_between(first, W, A{}),
                             lanes_between(first + length, W, A{})};
    map.apply(map.at(c), offset + i, W, Vec<A>{}, streamed);
  }
  return i;
}

// Maps values [begin, begin + length) of `channels` channels from c0 of sample n, with the coefficients of row `row`.
// Several channels must be whole rows, which are contiguous. Also prefetches the inputs `ahead` values later, or none
// if `ahead` is 0.
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
  const int64_t channel = row * s.c + c0, offset = (n * s.c + c0) * s.s + begin, position = n * s.s + begin;
  const int64_t total = channels * length;
  const bool narrow = length < W;
  if (narrow && (2 * length < W || total < W || map.weights)) {
    return map_some(original, channel, offset, position, length, 0, total);
  }
  int64_t i = 0, stop = total;
  if (streamed) {  // whole lines bypass the caches; writing part of such a line normally would be slow
    const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.first_output() + offset) / sizeof(T));
    const int64_t head = (kLine - at % kLine) % kLine;
    streamed = head + kLine <= total;
    if (streamed) {
      map_some(original, channel, offset, position, length, 0, head);
      i = head, stop = head + (total - head) / kLine * kLine;
    }
  }
  if (narrow) i = map_narrow(original, channel, channels, offset, length, i, stop, streamed);
  int64_t k = i / length, end = (k + 1) * length;
  while (!narrow) {
    const auto c = map.at(OneChannel<A>{channel + k});
    const int64_t until = end < stop ? end : stop, weight = position - k * length;
#pragma GCC unroll 4
    for (; i + W <= until; i += W) {
      if (ahead) map.template fetch<2>(offset + i + ahead);
      map.apply(c, offset + i, W, map.weights ? load(map.weights + weight + i, W) : Vec<A>{}, streamed);
    }
    if (i + W > stop) break;
    if (i < end) {  // this vector contains the end of one row and the start of the next
      if (map.weights) {
        map_some(original, channel, offset, position, length, i, i + W);
      } else {
        map.apply(map.at(TwoChannels<A>{channel + k, lanes_between(end - i, W, A{})}), offset + i, W, Vec<A>{},
                  streamed);
      }
      i += W;
    }
    ++k, end += length;
  }
  if (i == total) return;
  if (streamed) return map_some(original, channel, offset, position, length, i, total);
  i = total - W;  // the last full vector again
  if (narrow) return void(map_narrow(original, channel, channels, offset, length, i, total, false));
  map.apply(map.at(OneChannel<A>{channel + k}), offset + i, W,
            map.weights ? load(map.weights + position - k * length + i, W) : Vec<A>{}, false);
}

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
