// Normalization by the statistics of groups of samples, of weighted positions, or of both: forward, backward, and the
// update of the running statistics. x must be finite wherever a weight is 0; otherwise, an error is raised.
//
// Compiled twice: as operators (ops.cpp), and for the node of torch's autograd (autograd.cpp).
#pragma once

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "frame.h"
#include "running.h"

namespace batchnorm::parts {

// index [N] is each sample's group, and its row of weight and bias [groups, C]. If `shared`, it is only the row, and all
// samples have the same statistics.
struct Parts {
  MaybeTensor index, weights;
  int64_t groups;
  bool shared = false;
  bool by_group() const { return index && !shared; }
};

// [groups, C] and counts [groups], or [C] and scalars. count is Σ w, effective_count (Σ w)²/Σ w².
struct Statistics {
  Tensor count, mean, mean_low, var, effective_count;
};

inline std::pair<Tensor, Statistics> forward(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                             const MaybeTensor& residual, const Parts& parts,
                                             const Attributes& attributes) {
  TrainForward args{};
  Frame frame(x);
  const bool by_group = parts.by_group();
  STD_TORCH_CHECK((parts.index || parts.weights) && parts.groups > 0 && frame.shape.numel() > 0,
                  "batchnorm::strict_parts_forward expects values, groups and an index or weights, got too little. Call "
                  "moments and normalize.");
  const int64_t count = by_group ? parts.groups : 1, c = frame.shape.c;
  const DType dtype = statistics_of(frame.dtype);
  const auto rows = [&] { return empty_rows(by_group, count, c, dtype); };
  const auto counts = [&] {
    return empty(&count, std::array<int64_t, 1>{1}.data(), by_group ? 1 : 0, code_of(DType::float64));
  };
  Tensor y = frame.result();
  Statistics found{counts(), rows(), rows(), rows(), counts()};
  std::vector<double> sums(static_cast<size_t>(2 * count));
  args.normalization = normalization_of(frame, parts.index.has_value(), {}, {}, {}, weight, bias, attributes);
  args.normalization.index = frame.index(parts.index, parts.groups);
  read_forward(frame, args, x, residual);
  args.y = y.mutable_data_ptr();
  args.mean = found.mean.mutable_data_ptr();
  args.mean_low = found.mean_low.mutable_data_ptr();
  args.var = found.var.mutable_data_ptr();
  args.groups = by_group ? parts.groups : 0;
  args.weights = frame.read_weights(parts.weights);
  args.count = sums.data();
  kernels(frame.dtype).train_forward(threads(), args);
  STD_TORCH_CHECK(!parts.weights || all_finite(dtype, args.var, count * c),
                  "batchnorm::strict_parts_forward expects finite values, got infinity or NaN. Call moments and "
                  "normalize.");
  auto* total = static_cast<double*>(found.count.mutable_data_ptr());
  auto* effective = static_cast<double*>(found.effective_count.mutable_data_ptr());
  for (int64_t g = 0; g < count; ++g) {
    const double sum = sums[g], squares = sums[count + g];
    total[g] = sum;
    effective[g] = !parts.weights ? sum : sum * sum / (squares > 0.0 ? squares : 1.0);
  }
  return {frame.returned(y), found};
}

struct Gradients {
  Tensor dx, sum_dz_xhat, sum_dz, dz;  // dz is empty unless needed
};

// Returns dx, Σ dz·x̂, Σ dz and dz for the statistics of `forward`.
inline Gradients backward(const Tensor& dy, const Tensor& x, const MaybeTensor& residual, const MaybeTensor& y,
                          const Tensor& mean, const MaybeTensor& mean_low, const Tensor& var, const MaybeTensor& weight,
                          const MaybeTensor& bias, const Tensor& count, const Parts& parts,
                          const Attributes& attributes, bool need_dz) {
  Backward args{};
  Frame frame(x);
  const bool indexed = parts.index.has_value();
  args.normalization = normalization_of(frame, indexed, mean, mean_low, var, weight, bias, attributes);
  args.normalization.index = frame.index(parts.index, parts.groups);
  read_backward(frame, args, dy, x, residual, y);
  const std::vector<double> counts = values_of("count", count);
  STD_TORCH_CHECK(static_cast<int64_t>(counts.size()) == args.normalization.mean.rows,
                  "batchnorm::strict_parts_backward expects a count for each row of mean, got ", counts.size(),
                  ". Pass the count of strict_parts_forward.");
  args.groups = indexed ? parts.groups : 1;
  const auto sums = [&] { return empty_rows(indexed, parts.groups, frame.shape.c, statistics_of(frame.dtype)); };
  Gradients found{frame.result(), sums(), sums(), need_dz ? frame.result() : empty_vector(0, frame.dtype)};
  args.sum_dz_xhat = found.sum_dz_xhat.mutable_data_ptr();
  args.sum_dz = found.sum_dz.mutable_data_ptr();
  args.dx = found.dx.mutable_data_ptr();
  args.dz = need_dz ? found.dz.mutable_data_ptr() : nullptr;
  args.through_batch = true;
  args.count = counts.data();
  args.weights = frame.read_weights(parts.weights);
  kernels(frame.dtype).backward(threads(), args);
  found.dx = frame.returned(found.dx);
  if (need_dz) found.dz = frame.returned(found.dz);
  return found;
}

// Moves running statistics toward those of groups: each row toward its group's; or vectors [C] toward the mean of all
// values and the pooled variance, with the number of values whose divisor is that of the groups together (section "Ghost
// batches" of the mathematics page).
inline void update_(const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& num_batches_tracked,
                    const Statistics& statistics, std::optional<double> momentum, bool skip_nonfinite) {
  if (in_backward()) return;
  const std::vector<double> sums = values_of("count", statistics.count);
  const std::vector<double> n = values_of("effective_count", statistics.effective_count);
  const std::vector<double> high = values_of("mean", statistics.mean);
  const std::vector<double> low = values_of("mean_low", statistics.mean_low);
  const std::vector<double> biased = values_of("var", statistics.var);
  const size_t groups = n.size(), c = groups > 0 ? high.size() / groups : 0;
  STD_TORCH_CHECK(groups > 0 && sums.size() == groups && high.size() == groups * c && low.size() == high.size() &&
                      biased.size() == high.size(),
                  "batchnorm::strict_update_parts_ expects counts [G], and mean, mean_low and var [G, C], got other "
                  "sizes. Pass the results of strict_parts_forward.");
  if (running_mean.dim() == 2) {
    for (size_t g = 0; g < groups; ++g) {
      const auto row = static_cast<int64_t>(g);
      MaybeTensor tracked;
      if (num_batches_tracked) tracked = select(*num_batches_tracked, 0, row);
      const Batch<double> batch{&high[g * c], &low[g * c], &biased[g * c], c, n[g]};
      move_running(select(running_mean, 0, row), select(running_var, 0, row), tracked, batch, momentum, skip_nonfinite);
    }
    return;
  }
  if (groups == 1) {
    const Batch<double> batch{high.data(), low.data(), biased.data(), c, n[0]};
    return move_running(running_mean, running_var, num_batches_tracked, batch, momentum, skip_nonfinite);
  }
  double total = 0.0, parts = 0.0;
  for (size_t g = 0; g < groups; ++g) total += sums[g], parts += n[g] > 0.0 ? sums[g] / n[g] : 0.0;
  std::vector<double> pooled_mean(c), pooled_var(c);
  const std::vector<double> none(c);
  for (size_t g = 0; g < groups; ++g) {  // a group without counted values has weight zero
    const double share = total > 0.0 ? sums[g] / total : 0.0;
    for (size_t k = 0; k < c; ++k) {
      pooled_mean[k] += share * (high[g * c + k] + low[g * c + k]), pooled_var[k] += share * biased[g * c + k];
    }
  }
  const Batch<double> batch{pooled_mean.data(), none.data(), pooled_var.data(), c, parts > 0.0 ? total / parts : 0.0};
  move_running(running_mean, running_var, num_batches_tracked, batch, momentum, skip_nonfinite);
}

}  // namespace batchnorm::parts
