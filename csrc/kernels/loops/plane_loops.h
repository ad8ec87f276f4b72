// The hot loops over planes: [n, c, s] in memory, where a row is s values of one channel. See loops.h.
#pragma once

#include "kernels/kernels.h"
#include "sums.h"

namespace BATCHNORM_NAMESPACE {

// The last vector of a row whose length is no multiple of a vector: where it starts, and the lanes that no other vector
// has. In a row shorter than a vector, it starts with the row and goes beyond its end.
template <class A>
struct LastVector {
  int64_t start, whole;  // the vectors before it have `whole` values
  decltype(lanes_between<Vec<A>>(0, 0)) fresh;
  explicit LastVector(int64_t length)
      : start(length < kLanes<A> ? 0 : length - kLanes<A>),
        whole(length / kLanes<A> * kLanes<A>),
        fresh(lanes_between<Vec<A>>(whole - start, length - start)) {}
};

// a += Σ u and b += Σ u·v over `length` values from `offset`; their weights start at `position`. Also prefetches the
// values `ahead` positions later, or none if `ahead` is 0.
template <class Term>
BATCHNORM_INLINE void reduce_row(const Term& term, const typename Term::template Loaded<Vec<typename Term::A>>& c,
                                 int64_t offset, int64_t position, int64_t length,
                                 const LastVector<typename Term::A>& last, int64_t ahead, Vec<typename Term::A>& a,
                                 Vec<typename Term::A>& b) {
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
  term.pair(term.at(OneChannel<V>{channel}), offset, length, term.weights ? load(term.weights + position, length) : V{},
            u, v);
  const auto present = lanes_between<V>(0, length);
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
        reduce_row(term, term.at(OneChannel<Vec<A>>{channel}), offset, n * s.s + begin, length, last,
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
template <class V, class Map>
__attribute__((noinline)) static void map_some(const Map& map, int64_t channel, int64_t offset, int64_t position,
                                               int64_t length, int64_t i, int64_t end) {
  constexpr int64_t W = kValuesIn<V>;
  while (i < end) {
    const int64_t k = i / length, row_end = (k + 1) * length < end ? (k + 1) * length : end;
    const int64_t count = row_end - i < W ? row_end - i : W;
    map.apply(map.at(OneChannel<V>{channel + k}), offset + i, count,
              map.weights ? load_as<V>(map.weights + position + (i - k * length), count) : V{}, false);
    i += count;
  }
}

// The same in full vectors, as many as fit, of rows that have at least half a vector and no weights. Returns the end of
// the last one.
template <class V, class Map>
__attribute__((noinline)) static int64_t map_narrow(const Map& original, int64_t channel, int64_t channels,
                                                    int64_t offset, int64_t length, int64_t i, int64_t end,
                                                    bool streamed) {
  constexpr int64_t W = kValuesIn<V>;
  const Map map = original;
  for (; i + W <= end; i += W) {
    const int64_t k = i / length, first = (k + 1) * length - i;
    const ThreeChannels<V> c{channel + k, channel + channels - 1, lanes_between<V>(first, W),
                             lanes_between<V>(first + length, W)};
    map.apply(map.at(c), offset + i, W, V{}, streamed);
  }
  return i;
}

// `count` values from `first`, and the rest of a vector from `second`.
template <class V, class A>
BATCHNORM_INLINE V load_two(const A* first, int64_t count, const A* second) {
  A both[kValuesIn<V>];
  std::memcpy(both, first, static_cast<size_t>(count) * sizeof(A));
  std::memcpy(both + count, second, static_cast<size_t>(kValuesIn<V> - count) * sizeof(A));
  return load_as<V>(both, kValuesIn<V>);
}

// See MapPlanes.
template <class V, class Map>
static void map_planes_by(const Map& original, const Shape& s, int64_t n, int64_t c0, int64_t channels, int64_t begin,
                          int64_t length, int64_t row, bool streamed, int64_t ahead) {
  using T = typename Map::Type;
  constexpr int64_t W = kValuesIn<V>, kLine = 64 / sizeof(T);
  const Map map = original;
  const int64_t channel = row * s.c + c0, offset = (n * s.c + c0) * s.s + begin, position = n * s.s + begin;
  const int64_t total = channels * length;
  const bool narrow = length < W;
  if (narrow && (2 * length < W || total < W || map.weights)) {
    return map_some<V>(original, channel, offset, position, length, 0, total);
  }
  int64_t i = 0, stop = total;
  if (streamed) {  // whole lines bypass the caches; writing part of such a line normally would be slow
    const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.first_output() + offset) / sizeof(T));
    const int64_t head = (kLine - at % kLine) % kLine;
    streamed = head + kLine <= total;
    if (streamed) {
      map_some<V>(original, channel, offset, position, length, 0, head);
      i = head, stop = head + (total - head) / kLine * kLine;
    }
  }
  if (narrow) i = map_narrow<V>(original, channel, channels, offset, length, i, stop, streamed);
  int64_t k = i / length, end = (k + 1) * length;
  while (!narrow) {
    const auto c = map.at(OneChannel<V>{channel + k});
    const int64_t until = end < stop ? end : stop, weight = position - k * length;
    for (; i + W <= until; i += W) {
      if (ahead) map.template fetch<2>(offset + i + ahead);
      map.apply(c, offset + i, W, map.weights ? load_as<V>(map.weights + weight + i, W) : V{}, streamed);
    }
    if (i + W > stop) break;
    if (i < end) {  // this vector contains the end of one row and the start of the next
      const V w = map.weights ? load_two<V>(map.weights + weight + i, end - i, map.weights + position) : V{};
      const TwoChannels<V> both{channel + k, channel + k + 1, lanes_between<V>(end - i, W)};
      map.apply(map.at(both), offset + i, W, w, streamed);
      i += W;
    }
    ++k, end += length;
  }
  if (i == total) return;
  if (streamed) return map_some<V>(original, channel, offset, position, length, i, total);
  i = total - W;  // the last full vector again
  if (narrow) return void(map_narrow<V>(original, channel, channels, offset, length, i, total, false));
  map.apply(map.at(OneChannel<V>{channel + k}), offset + i, W,
            map.weights ? load_as<V>(map.weights + position - k * length + i, W) : V{}, false);
}

// Maps values [begin, begin + length) of `channels` channels from c0 of sample n, with the coefficients of row `row`.
// Several channels must be whole rows, which are contiguous. Also prefetches the inputs `ahead` values later, or none
// if `ahead` is 0.
using MapPlanes = void (*)(const void* map, const Shape& s, int64_t n, int64_t c0, int64_t channels, int64_t begin,
                           int64_t length, int64_t row, bool streamed, int64_t ahead);

// Maps by packets, or by vectors if rows are shorter than a packet.
template <class Map>
static void map_planes(const void* self, const Shape& s, int64_t n, int64_t c0, int64_t channels, int64_t begin,
                       int64_t length, int64_t row, bool streamed, int64_t ahead) {
  using T = typename Map::Type;
  const Map& map = *static_cast<const Map*>(self);
  if (sizeof(T) < 4 && length < kPacket<T>) {
    return map_planes_by<Vec<Arithmetic<T>>>(map, s, n, c0, channels, begin, length, row, streamed, ahead);
  }
  map_planes_by<Packet<T>>(map, s, n, c0, channels, begin, length, row, streamed, ahead);
}

}  // namespace BATCHNORM_NAMESPACE
