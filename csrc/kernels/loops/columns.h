// The hot loops over planes with short rows that vectors do not divide, such as 7×7.
//
// The rows of several channels of a sample are contiguous. They are cut into packets, and each packet is processed for
// several samples, so that its coefficients are loaded once. It has values of one channel, or of two.
#pragma once

#include "kernels/kernels.h"
#include "sums.h"

namespace BATCHNORM_NAMESPACE {

// Returns the number of channels whose rows are whole cache lines, if rows are processed in this way, otherwise 1.
static int64_t channels_in_columns(const Shape& s, const Values& values) {
  constexpr int64_t kLine = 64, kLongest = 128;
  const int64_t packet = values.bytes < 4 ? 2 * values.lanes : values.lanes;
  if (s.s < packet || s.s > kLongest || s.s % packet == 0) return 1;
  int64_t channels = 1;
  while (channels * s.s * values.bytes % kLine != 0) channels *= 2;
  return s.c % channels == 0 ? channels : 1;
}

// The channel of a packet's first value, and the end of its row.
template <class V>
struct PacketPlace {
  int64_t channel, end;
  bool crosses(int64_t i) const { return end - i < kValuesIn<V>; }
  TwoChannels<V> channels(int64_t i) const {
    return {channel, channel + crosses(i), lanes_between<V>(end - i, kValuesIn<V>)};
  }
  void move(int64_t i, int64_t length) {  // to a later packet, at most one row further
    if (i >= end) ++channel, end += length;
  }
};

BATCHNORM_INLINE Vec<double> wide_sum(Pair<Vec<float>> v) { return wide_sum(v.low) + wide_sum(v.high); }

// Adds the sums of samples [n0, n1) to sums[0 .. channels), for channels from c0. Channels are a multiple of
// `channels_in_columns`, which cuts the columns in the same places for any c0.
using ReduceColumns = void (*)(const void* term, const Shape& s, int64_t n0, int64_t n1, int64_t c0, int64_t channels,
                               WideSums* sums);

template <class Term>
static void reduce_columns(const void* self, const Shape& s, int64_t n0, int64_t n1, int64_t c0, int64_t channels,
                           WideSums* sums) {
  using T = typename Term::Type;
  using V = Packet<T>;
  constexpr int64_t W = kPacket<T>, kTogether = 4 * kLanes<typename Term::A> / W, kSamplesAhead = 4;
  const Term term = *static_cast<const Term*>(self);
  const int64_t pitch = s.c * s.s, offset = c0 * s.s, total = channels * s.s;
  PacketPlace<V> place{c0, s.s};
  WideSums own[kChannelsAtOnce];  // added at the end, so that the order of additions does not depend on other samples
  auto column = [&](auto constant, int64_t i) __attribute__((always_inline)) {
    constexpr int64_t kPackets = decltype(constant)::value;
    typename Term::template Loaded<V> c[kPackets];
    PacketPlace<V> places[kPackets];
    V a[kPackets]{}, b[kPackets]{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < kPackets; ++k) {
      place.move(i + k * W, s.s);
      places[k] = place;
      c[k] = term.at(place.channels(i + k * W));
    }
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t from = n * pitch + offset + i;
      fetch_lines<1>(term, from + kSamplesAhead * pitch, kPackets * W);
#pragma GCC unroll 4
      for (int64_t k = 0; k < kPackets; ++k) {
        V u, v;
        term.pair(c[k], from + k * W, W, V{}, u, v);
        a[k] = a[k] + u;
        b[k] = fma(u, v, b[k]);
      }
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < kPackets; ++k) {
      WideSums* to = own + places[k].channel - c0;
      if (places[k].crosses(i + k * W)) {
        const auto next = places[k].channels(i + k * W).next;
        to[1].u = to[1].u + wide_sum(select(next, a[k], V{}));
        to[1].uv = to[1].uv + wide_sum(select(next, b[k], V{}));
        a[k] = select(next, V{}, a[k]), b[k] = select(next, V{}, b[k]);
      }
      to->u = to->u + wide_sum(a[k]);
      to->uv = to->uv + wide_sum(b[k]);
    }
  };
  int64_t i = 0;
  for (; i + kTogether * W <= total; i += kTogether * W) column(Constant<int64_t, kTogether>{}, i);
  for (; i < total; i += W) column(Constant<int64_t, 1>{}, i);
  for (int64_t k = 0; k < channels; ++k) sums[k].u = sums[k].u + own[k].u, sums[k].uv = sums[k].uv + own[k].uv;
}

// Maps samples [n0, n1) of as many channels from c0. Also prefetches the inputs `ahead` values later, or none if `ahead`
// is 0.
using MapColumns = void (*)(const void* map, const Shape& s, int64_t n0, int64_t n1, int64_t c0, int64_t channels,
                            bool streamed, int64_t ahead);

template <class Map>
static void map_columns(const void* self, const Shape& s, int64_t n0, int64_t n1, int64_t c0, int64_t channels,
                        bool streamed, int64_t ahead) {
  using V = Packet<typename Map::Type>;
  constexpr int64_t W = kValuesIn<V>;
  const Map map = *static_cast<const Map*>(self);
  const int64_t pitch = s.c * s.s, offset = c0 * s.s, total = channels * s.s;
  PacketPlace<V> place{c0, s.s};
  for (int64_t i = 0; i < total; i += W) {
    place.move(i, s.s);
    const auto c = map.at(place.channels(i));
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t from = n * pitch + offset + i;
      if (ahead) map.template fetch<2>(from + ahead);
      map.apply(c, from, W, V{}, streamed);
    }
  }
}

}  // namespace BATCHNORM_NAMESPACE
