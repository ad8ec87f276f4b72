// Drivers for [n, c, s] in memory, where each row of s values belongs to one channel.
//
// A thread sums a few channels and then maps them at once, in reverse order, because the values read last are still in
// its cache. If there are too few channels for the threads, the threads share each channel block by block.
#pragma once

#include "loops.h"
#include "parallel.h"

namespace BATCHNORM_NAMESPACE {

// How samples differ. `group`, if given, holds the group of each sample, whose values are summed together; otherwise,
// there is one group. The others, if given, hold the row of coefficients of each sample: in the sums, and in the map.
struct Samples {
  int64_t groups = 1;
  const int64_t* group = nullptr;
  const int64_t* summed = nullptr;
  const int64_t* mapped = nullptr;
};

// The sums of one channel, by group.
struct SumsByGroup {
  const WideSums* first;
  int64_t stride;
  double u(int64_t group) const { return sum_lanes(first[group * stride].u); }
  double uv(int64_t group) const { return sum_lanes(first[group * stride].uv); }
};

// The steps before and after the sums of a channel.
struct PlaneSteps {
  virtual void begin(int64_t /*c0*/, int64_t /*channels*/) {}  // at most kChannelsAtOnce of them
  // Returns true to sum this channel, and no other, once more. A channel's result therefore does not depend on other
  // channels. Returns false if `again`.
  virtual bool finish(int64_t c, const SumsByGroup& sums, bool again) = 0;

 protected:
  ~PlaneSteps() = default;
};

// The fixed blocks of a channel's values, independent of the threads: short rows of several samples of one group, or
// part of a long row.
struct PlaneBlocks {
  struct Run {
    int64_t begin, end, group;
  };
  const Shape& s;
  const int64_t* rows;
  const int64_t unit;  // channels that are summed together, as columns; 1 if they are summed by rows
  int64_t piece, pieces, count = 0;
  Run* runs;

  PlaneBlocks(const Shape& shape, const Values& values, const Samples& by, bool columns, Scratch& scratch)
      : s(shape),
        rows(by.summed),
        unit(columns && !by.group && !rows ? channels_in_columns(s, values) : 1),
        piece(kAdditions * 4 * values.lanes),
        pieces((s.s + piece - 1) / piece) {
    const int64_t fours = s.s / (4 * values.lanes), ones = (s.s % (4 * values.lanes) + values.lanes - 1) / values.lanes;
    int64_t samples = unit > 1 ? kAdditions : kAdditions / (fours + ones > 0 ? fours + ones : 1);
    if (samples < 1) samples = 1;
    runs = scratch.get<Run>(by.group ? s.n : (s.n + samples - 1) / samples);
    int64_t run = 0;
    for (int64_t n = 0, next = 0; n < s.n; n = next) {
      next = s.n - n < samples ? s.n : n + samples;
      const int64_t group = by.group ? by.group[n] : 0;
      for (int64_t k = n + 1; by.group && k < next; ++k) next = by.group[k] == group ? next : k;
      runs[run++] = {n, next, group};
    }
    count = run * pieces;
  }
  int64_t group(int64_t block) const { return runs[block / pieces].group; }

  // Adds the sums of a block of `channels` channels from c0, whole units.
  void reduce(const Reducer& reducer, int64_t block, int64_t c0, int64_t channels, WideSums* sums) const {
    const Run& run = runs[block / pieces];
    if (unit > 1) return reducer.columns(reducer.term, s, run.begin, run.end, c0, channels, sums);
    const int64_t begin = block % pieces * piece, length = s.s - begin < piece ? s.s - begin : piece;
    reducer.planes(reducer.term, s, run.begin, run.end, begin, length, c0, channels, rows, sums);
  }
  // Computes the sums of all blocks: sums[group·channels + channel - c0].
  SumsByGroup reduce_all(const Reducer& reducer, int64_t c0, int64_t channels, int64_t groups, WideSums* sums) const {
    for (int64_t i = 0; i < groups * channels; ++i) sums[i] = WideSums{};
    for (int64_t b = 0; b < count; ++b) reduce(reducer, b, c0, channels, sums + group(b) * channels);
    return {sums, channels};
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

// The channels that are summed at once: as many as remain in the cache until they are mapped, with their sums.
static int64_t channels_at_once(const Shape& s, bool maps, int inputs, const Values& values, int64_t groups) {
  constexpr int64_t kSumsAtOnce = 8 * kChannelsAtOnce;
  int64_t channels = maps ? kCacheBytes / (s.n * s.s * values.bytes * inputs) : kChannelsAtOnce;
  if (channels * groups > kSumsAtOnce) channels = kSumsAtOnce / groups;
  return channels < 1 ? 1 : channels > kChannelsAtOnce ? kChannelsAtOnce : channels;
}

// Maps `channels` channels from c0, the last samples first. Also prefetches the inputs `ahead` values later, unless it
// is 0.
static void map_channels(const Shape& s, const Mapper& mapper, int64_t unit, int64_t c0, int64_t channels,
                         bool streamed, int64_t ahead, const int64_t* rows) {
  constexpr int64_t kSamples = 4;
  if (!mapper.map) return;
  if (unit > 1 && mapper.columns && !rows) {
    streamed = streamed && reinterpret_cast<uintptr_t>(mapper.output) % 64 == 0;
    for (int64_t n = s.n; n > 0; n -= kSamples) {
      mapper.columns(mapper.map, s, n > kSamples ? n - kSamples : 0, n, c0, channels, streamed, ahead);
    }
    return;
  }
  for (int64_t n = s.n - 1; n >= 0; --n) {
    mapper.planes(mapper.map, s, n, c0, channels, 0, s.s, rows ? rows[n] : 0, streamed, ahead);
  }
}

// Sums each channel, calls `steps`, then maps. `inputs` is the number of tensors that are read twice.
static void reduce_then_map(const Threads& threads, const Shape& s, const Reducer& reducer, PlaneSteps& steps,
                            const Mapper& mapper, bool streamed, int inputs, const Values& values,
                            const Samples& by = {}) {
  Scratch scratch;
  const PlaneBlocks blocks(s, values, by, reducer.columns, scratch);
  const int64_t unit = blocks.unit, units = s.c / unit, rounds = (units + threads.count - 1) / threads.count;
  const bool by_channel = s.numel() < 2 * kGrain || rounds * threads.count * 4 <= units * 5;
  if (by_channel) {
    int64_t most = channels_at_once(s, mapper.map, inputs, values, by.groups) / unit * unit;
    if (most == 0) most = unit;
    parallel(threads, units, unit * s.n * s.s, [&](int64_t begin, int64_t end) {
      Scratch own;
      auto* sums = own.get<WideSums>(by.groups * most);
      WideSums* more = nullptr;
      const int64_t c_end = end * unit;
      for (int64_t c0 = begin * unit; c0 < c_end; c0 += most) {
        const int64_t channels = c_end - c0 < most ? c_end - c0 : most;
        steps.begin(c0, channels);
        const SumsByGroup found = blocks.reduce_all(reducer, c0, channels, by.groups, sums);
        for (int64_t k = 0; k < channels; ++k) {
          if (!steps.finish(c0 + k, {found.first + k, found.stride}, false)) continue;
          if (!more) more = own.get<WideSums>(by.groups * unit);
          const SumsByGroup again = blocks.reduce_all(reducer, c0 + k / unit * unit, unit, by.groups, more);
          steps.finish(c0 + k, {again.first + k % unit, again.stride}, true);
        }
        // Mapping writes more than it reads, so it prefetches the next channels.
        const int64_t ahead = c0 + most < c_end ? most * s.s : 0;
        map_channels(s, mapper, unit, c0, channels, streamed, ahead, by.mapped);
      }
      if (streamed) stream_fence();
    });
    return;
  }

  // sums[(unit · blocks + block) · channels of a unit + channel]
  auto* sums = scratch.get<WideSums>(s.c * blocks.count);
  auto* totals = scratch.get<WideSums>(by.groups);
  auto* finished = scratch.get<bool>(s.c);
  for (int64_t c = 0; c < s.c; ++c) finished[c] = false;
  for (int64_t c = 0; c < s.c; c += kChannelsAtOnce) steps.begin(c, s.c - c < kChannelsAtOnce ? s.c - c : kChannelsAtOnce);
  for (bool again = false, unfinished = true; unfinished; again = true) {
    parallel(threads, units * blocks.count, unit * blocks.piece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c0 = i / blocks.count * unit;
        bool skip = true;
        for (int64_t k = 0; k < unit; ++k) skip &= finished[c0 + k];
        if (skip) continue;
        for (int64_t k = 0; k < unit; ++k) sums[i * unit + k] = WideSums{};
        blocks.reduce(reducer, i % blocks.count, c0, unit, sums + i * unit);
      }
    });
    unfinished = false;
    for (int64_t c = 0; c < s.c; ++c) {
      if (finished[c]) continue;
      for (int64_t g = 0; g < by.groups; ++g) totals[g] = WideSums{};
      for (int64_t b = 0; b < blocks.count; ++b) {
        WideSums& total = totals[blocks.group(b)];
        const WideSums& own = sums[(c / unit * blocks.count + b) * unit + c % unit];
        total.u = total.u + own.u;
        total.uv = total.uv + own.uv;
      }
      finished[c] = !steps.finish(c, {totals, 1}, again);
      unfinished |= !finished[c];
    }
  }
  if (mapper.map) map_all_planes(threads, s, mapper, streamed, by.mapped);
}

}  // namespace BATCHNORM_NAMESPACE
