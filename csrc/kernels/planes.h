// Drivers for [n, c, s] in memory, where each row of s values belongs to one channel.
//
// A thread sums a few channels and then maps them at once, in reverse order, because the values read last are still in
// its cache. If there are too few channels for the threads, the threads share each channel block by block.
#pragma once

#include "loops.h"
#include "parallel.h"

namespace BATCHNORM_NAMESPACE {

// The steps before and after the sums of a channel.
struct PlaneSteps {
  virtual void begin(int64_t /*c0*/, int64_t /*channels*/) {}  // at most kChannelsAtOnce of them
  // Returns true to sum this channel, and no other, once more. A channel's result therefore does not depend on other
  // channels. Returns false if `again`.
  virtual bool finish(int64_t c, const WideSums& sums, bool again) = 0;

 protected:
  ~PlaneSteps() = default;
};

// The fixed blocks of a channel's values, independent of the threads: several short rows, or part of a long row.
struct PlaneBlocks {
  const Shape& s;
  int64_t piece, pieces, samples, count;
  PlaneBlocks(const Shape& shape, const Values& values) : s(shape), piece(kAdditions * 4 * values.lanes) {
    pieces = (s.s + piece - 1) / piece;
    const int64_t fours = s.s / (4 * values.lanes), ones = (s.s % (4 * values.lanes) + values.lanes - 1) / values.lanes;
    samples = kAdditions / (fours + ones > 0 ? fours + ones : 1);
    if (samples < 1) samples = 1;
    count = (s.n + samples - 1) / samples * pieces;
  }
  int64_t length(int64_t begin) const { return s.s - begin < piece ? s.s - begin : piece; }

  void reduce(const Reducer& reducer, int64_t block, int64_t c0, int64_t channels, WideSums* sums) const {
    const int64_t n0 = block / pieces * samples, n1 = n0 + samples < s.n ? n0 + samples : s.n;
    const int64_t begin = block % pieces * piece;
    reducer.planes(reducer.term, s, n0, n1, begin, length(begin), c0, channels, nullptr, sums);
  }
};

// Maps all rows, in any order. `rows`, if given, holds each sample's row of coefficients.
static void map_all_planes(const Threads& threads, const Shape& s, const Mapper& mapper, bool streamed,
                           const int64_t* rows) {
  constexpr int64_t kPiece = 16384, kAligned = 16;
  // Parts of a long row, or several short rows. They consist of whole cache lines if possible.
  const int64_t pieces = (s.s + kPiece - 1) / kPiece, length = pieces > 1 ? kPiece : s.s;
  int64_t together = pieces > 1 ? 1 : kPiece / s.s;
  if (together > kAligned) together = together / kAligned * kAligned;
  if (together > s.c) together = s.c;
  const int64_t runs = (s.c + together - 1) / together;
  parallel(threads, s.n * runs * pieces, together * length, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t run = i / pieces, start = i % pieces * length, rest = s.s - start < length ? s.s - start : length;
      const int64_t n = run / runs, c = run % runs * together, channels = s.c - c < together ? s.c - c : together;
      mapper.planes(mapper.map, s, n, c, channels, start, rest, rows ? rows[n] : 0, streamed, 0);
    }
    if (streamed) stream_fence();
  });
}

// Sums each channel, calls `steps`, then maps. `inputs` is the number of tensors that are read twice.
static void reduce_then_map(const Threads& threads, const Shape& s, const Reducer& reducer, PlaneSteps& steps,
                            const Mapper& mapper, bool streamed, int inputs, const Values& values) {
  const PlaneBlocks blocks(s, values);
  const int64_t rounds = (s.c + threads.count - 1) / threads.count;
  const bool by_channel = s.numel() < 2 * kGrain || rounds * threads.count * 4 <= s.c * 5;
  if (by_channel) {
    int64_t group = mapper.map ? kCacheBytes / (s.n * s.s * values.bytes * inputs) : kChannelsAtOnce;
    group = group < 1 ? 1 : group > kChannelsAtOnce ? kChannelsAtOnce : group;
    parallel(threads, s.c, s.n * s.s, [&](int64_t c_begin, int64_t c_end) {
      for (int64_t c0 = c_begin; c0 < c_end; c0 += group) {
        const int64_t channels = c_end - c0 < group ? c_end - c0 : group;
        steps.begin(c0, channels);
        WideSums sums[kChannelsAtOnce];
        for (int64_t b = 0; b < blocks.count; ++b) blocks.reduce(reducer, b, c0, channels, sums);
        for (int64_t k = 0; k < channels; ++k) {
          if (!steps.finish(c0 + k, sums[k], false)) continue;
          WideSums more;
          for (int64_t b = 0; b < blocks.count; ++b) blocks.reduce(reducer, b, c0 + k, 1, &more);
          steps.finish(c0 + k, more, true);
        }
        // Mapping writes more than it reads, so it prefetches the next channels.
        const int64_t ahead = c0 + group < c_end ? group * s.s : 0;
        for (int64_t n = s.n - 1; mapper.map && n >= 0; --n) {
          mapper.planes(mapper.map, s, n, c0, channels, 0, s.s, 0, streamed, ahead);
        }
      }
      if (streamed) stream_fence();
    });
    return;
  }

  Scratch scratch;
  auto* sums = scratch.get<WideSums>(s.c * blocks.count);
  auto* finished = scratch.get<bool>(s.c);
  for (int64_t c = 0; c < s.c; ++c) finished[c] = false;
  for (int64_t c = 0; c < s.c; c += kChannelsAtOnce) steps.begin(c, s.c - c < kChannelsAtOnce ? s.c - c : kChannelsAtOnce);
  for (bool again = false, unfinished = true; unfinished; again = true) {
    parallel(threads, s.c * blocks.count, blocks.piece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (finished[i / blocks.count]) continue;
        sums[i] = WideSums{};
        blocks.reduce(reducer, i % blocks.count, i / blocks.count, 1, sums + i);
      }
    });
    unfinished = false;
    for (int64_t c = 0; c < s.c; ++c) {
      if (finished[c]) continue;
      WideSums total;
      for (int64_t b = 0; b < blocks.count; ++b) {
        total.u = total.u + sums[c * blocks.count + b].u;
        total.uv = total.uv + sums[c * blocks.count + b].uv;
      }
      finished[c] = !steps.finish(c, total, again);
      unfinished |= !finished[c];
    }
  }
  if (mapper.map) map_all_planes(threads, s, mapper, streamed, nullptr);
}

// Sums per group of samples: u[groups[n]·c + channel] and uv, which start at zero. Without `groups` there is one group.
// `rows`, if given, holds each sample's row of coefficients.
static void reduce_grouped_planes(const Threads& threads, const Shape& s, const Reducer& reducer, const int64_t* rows,
                                  const int64_t* groups, const Values& values, double* u, double* uv) {
  const PlaneBlocks blocks(s, values);
  parallel(threads, s.c, s.n * s.s, [&](int64_t c_begin, int64_t c_end) {
    for (int64_t c0 = c_begin; c0 < c_end; c0 += kChannelsAtOnce) {
      const int64_t channels = c_end - c0 < kChannelsAtOnce ? c_end - c0 : kChannelsAtOnce;
      for (int64_t n = 0, next = 0; n < s.n; n = next) {
        const int64_t group = groups ? groups[n] : 0;
        do ++next;
        while (next < s.n && next - n < blocks.samples && (!groups || groups[next] == group));
        WideSums sums[kChannelsAtOnce];
        for (int64_t begin = 0; begin < s.s; begin += blocks.piece) {
          reducer.planes(reducer.term, s, n, next, begin, blocks.length(begin), c0, channels, rows, sums);
        }
        for (int64_t k = 0; k < channels; ++k) {
          const int64_t i = group * s.c + c0 + k;
          u[i] += sum_lanes(sums[k].u);
          uv[i] += sum_lanes(sums[k].uv);
        }
      }
    }
  });
}

}  // namespace BATCHNORM_NAMESPACE
