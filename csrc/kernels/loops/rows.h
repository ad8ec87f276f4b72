// Drivers for rows of lanes, where each lane is a channel: [n, c], and [n, s, c] in memory (channels-last).
//
// With few channels, several positions form one longer row; [n, c, s] with a tiny s is a row of c·s lanes. Each thread
// sums a range of rows. When all sums are complete, it maps its rows in reverse order, because the values read last are
// still in the cache. (Tiles of channels, which read x once, were slower, because their lines map to few sets of the
// cache.)
#pragma once

#include "loops.h"
#include "planes.h"

namespace BATCHNORM_NAMESPACE {

// A view of x as `rows` rows of `lanes` lanes, and a last row of `rest` lanes.
struct RowShape {
  int64_t lanes, rows, rest;
  int64_t channels, positions;  // lane j is channel (j / positions) % channels
  int64_t per_sample;           // rows of a sample, for index and weights
  bool one_to_one() const { return lanes == channels; }
  int64_t channel(int64_t lane) const { return positions > 1 ? lane / positions : lane % channels; }
};

// With `whole`, positions are not combined into longer rows. Rows with their own coefficients or weights need this.
template <class T>
static RowShape row_shape(const Shape& s, bool whole) {
  if (!s.channels_last && s.s > 1) return {s.c * s.s, s.n, 0, s.c, s.s, 1};
  int64_t rows = s.n * s.s, together = 1;
  if (!whole && s.c > 0) {
    constexpr int64_t W = kPacket<T>, kTogether = 4 * kLanes<Arithmetic<T>>;
    while (together * s.c % W != 0 && together < W) together *= 2;
    while (together * s.c < kTogether || (together * s.c % kTogether != 0 && together * s.c < 8 * kTogether)) {
      together *= 2;
    }
    // Longer rows must pay for spreading coefficients over their lanes.
    const int64_t least = s.c < 4 * kTogether ? 16 : 1024;
    if (together * s.c > 4096 || rows < least * together) together = 1;
  }
  return {s.c * together, rows / together, rows % together * s.c, s.c, 1, s.s};
}

// The fixed division of the rows into chunks, whose sums are added in order. The last chunk may be the rest. Each chunk
// has sums of all groups, which limits their number.
struct Chunks {
  int64_t rows, whole, count;
  Chunks(const RowShape& r, int64_t groups) {
    int64_t most = r.lanes > 0 ? 32768 / r.lanes : 1;
    most = most < 4 ? 4 : most > 64 ? 64 : most;
    if (most * groups * 4 > r.rows && groups > 1) most = r.rows / (groups * 4);
    if (r.rows * r.lanes < 2 * kGrain || most < 1) most = 1;
    rows = (r.rows + most - 1) / most;
    rows = (rows + kAdditions - 1) / kAdditions * kAdditions;
    if (rows < 1) rows = kAdditions;
    whole = (r.rows + rows - 1) / rows;
    count = whole + (r.rest > 0);
  }
};

// The steps before and after the sums of the lanes.
struct RowSteps {
  virtual void begin() {}
  // Returns true to sum all lanes once more. Returns false if `again`. May change the sums, [groups, lanes].
  virtual bool finish(double* u, double* uv, bool again) = 0;

 protected:
  ~RowSteps() = default;
};

// Rows can be streamed if every vector of every row is aligned.
static bool rows_streamed(const Mapper& mapper, int64_t lanes, bool streamed, const Values& values) {
  return streamed && lanes * values.bytes % 64 == 0 && reinterpret_cast<uintptr_t>(mapper.output) % 64 == 0;
}

// Returns the end of the rows from `row`, at most `last`, whose samples have the same group and the same coefficients.
static int64_t end_of_run(const RowShape& r, int64_t row, int64_t last, const int64_t* group, const int64_t* of_sample) {
  if (!group && !of_sample) return last;
  int64_t n = row / r.per_sample, next = 0;
  const int64_t own_group = group ? group[n] : 0, own_row = of_sample ? of_sample[n] : 0;
  do next = ++n * r.per_sample;
  while (next < last && (!group || group[n] == own_group) && (!of_sample || of_sample[n] == own_row));
  return next < last ? next : last;
}

// The bytes of a tensor that are mapped forward before the mapping goes back. Small blocks jump too often for the
// processor's own prefetching.
inline constexpr int64_t kMappedTogether = 1 << 20;

// Maps all rows. Each thread maps a range of rows in blocks. The last block comes first, because it is still in the
// cache if all rows were just read. Within a block, rows are mapped forward, because memory is prefetched in that
// direction only. `of_sample`, if given, holds each sample's row of coefficients.
static void map_all_rows(const Threads& threads, const RowShape& r, const Mapper& mapper, bool streamed,
                         const Values& values, const int64_t* of_sample) {
  streamed = rows_streamed(mapper, r.lanes, streamed, values);
  const int64_t few = kMappedTogether / (r.lanes * values.bytes) + 4;
  parallel(threads, r.rows, r.lanes, [&](int64_t begin, int64_t end) {
    for (int64_t last = end; last > begin; last -= few) {
      for (int64_t row = last - few > begin ? last - few : begin, next = 0; row < last; row = next) {
        next = end_of_run(r, row, last, nullptr, of_sample);
        const int64_t coefficients = of_sample ? of_sample[row / r.per_sample] * r.channels : 0;
        mapper.rows(mapper.map, r.lanes, row, next, 0, r.lanes, coefficients, streamed);
      }
    }
    if (streamed) stream_fence();
  });
  if (r.rest > 0) mapper.rows(mapper.map, r.lanes, r.rows, r.rows + 1, 0, r.rest, 0, false);
}

// Sums each lane, calls `steps`, then maps.
static void reduce_then_map(const Threads& threads, const RowShape& r, const Reducer& reducer, RowSteps& steps,
                            const Mapper& mapper, bool streamed, const Values& values, const Samples& by = {}) {
  const Chunks chunks(r, by.groups);
  const int64_t all = by.groups * r.lanes;
  auto reduce_chunk = [&](int64_t chunk, double* u, double* uv) {
    if (chunk >= chunks.whole) return reducer.rows(reducer.term, r.lanes, r.rows, r.rows + 1, 0, r.rest, 0, u, uv);
    const int64_t begin = chunk * chunks.rows, end = begin + chunks.rows < r.rows ? begin + chunks.rows : r.rows;
    for (int64_t row = begin, next = 0; row < end; row = next) {
      next = end_of_run(r, row, end, by.group, by.summed);
      const int64_t n = row / r.per_sample, group = by.group ? by.group[n] * r.lanes : 0;
      const int64_t coefficients = by.summed ? by.summed[n] * r.channels : 0;
      reducer.rows(reducer.term, r.lanes, row, next, 0, r.lanes, coefficients, u + group, uv + group);
    }
  };

  Scratch scratch;
  double* sums = scratch.get<double>(2 * all * chunks.count);
  steps.begin();
  for (bool again = false;; again = true) {
    parallel(threads, chunks.count, chunks.rows * r.lanes, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* u = sums + chunk * 2 * all;
        for (int64_t j = 0; j < 2 * all; ++j) u[j] = 0.0;
        reduce_chunk(chunk, u, u + all);
      }
    });
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
      for (int64_t j = 0; j < 2 * all; ++j) sums[j] += sums[chunk * 2 * all + j];
    }
    if (!steps.finish(sums, sums + all, again)) break;
  }
  if (mapper.map) map_all_rows(threads, r, mapper, streamed, values, by.mapped);
}

}  // namespace BATCHNORM_NAMESPACE
