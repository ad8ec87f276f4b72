// The operators of whitening on the CPU, through torch's stable ABI.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "frame.h"

namespace {

using namespace batchnorm;

std::tuple<Tensor, Tensor> whiten_products(const Tensor& x, const MaybeTensor& mean, const MaybeTensor& dy,
                                           const MaybeTensor& weights, int64_t size) {
  Frame frame(x);
  STD_TORCH_CHECK(size >= 1 && !(dy && weights), "batchnorm::whiten_products expects size >= 1, and dy or weights, ",
                  "got ", size, dy && weights ? " and both" : "",
                  ". Pass the channels of a group, and at most one of the two tensors.");
  const int64_t columns = std::min(size, frame.shape.c);
  const int64_t sizes[] = {frame.shape.c, columns}, strides[] = {columns, 1};
  Tensor products = empty(sizes, strides, 2, code_of(DType::float64));
  Tensor sums = empty_vector(frame.shape.c, DType::float64);
  WhitenProducts args{};
  args.shape = frame.shape;
  args.size = size;
  args.x = frame.read("x", x);
  args.mean = frame.read_channels("mean", mean, 1);
  args.dy = frame.read("dy", dy);
  args.weights = frame.read_weights(weights);
  args.products = static_cast<double*>(products.mutable_data_ptr());
  args.sums = static_cast<double*>(sums.mutable_data_ptr());
  kernels(frame.dtype).whiten_products(threads(), args);
  return {products, sums};
}

Tensor whiten_map(const Tensor& x, const MaybeTensor& mean, const Tensor& matrices, const Tensor& shift,
                  const MaybeTensor& dy, const MaybeTensor& dy_matrices, const MaybeTensor& weights) {
  Frame frame(x);
  STD_TORCH_CHECK(dy.has_value() == dy_matrices.has_value() && matrices.dim() == 2,
                  "batchnorm::whiten_map expects matrices [C, size], and dy with dy_matrices, got ",
                  shape_text(matrices.sizes().data(), matrices.dim()), " and one of the two. Pass both or neither.");
  const int64_t columns = matrices.size(1);
  STD_TORCH_CHECK(columns <= frame.shape.c && (columns >= 1 || frame.shape.c == 0),
                  "batchnorm::whiten_map expects matrices of 1 to C = ", frame.shape.c, " columns, got ", columns,
                  ". Pass one column for each channel of a group.");
  Tensor y = frame.result();
  WhitenMap args{};
  args.shape = frame.shape;
  args.size = columns;
  args.x = frame.read("x", x);
  args.mean = frame.read_channels("mean", mean, 1);
  args.matrices = frame.read_channels("matrices", matrices, columns);
  args.shift = frame.read_channels("shift", shift, 1);
  args.dy = frame.read("dy", dy);
  args.dy_matrices = frame.read_channels("dy_matrices", dy_matrices, columns);
  args.weights = frame.read_weights(weights);
  args.y = y.mutable_data_ptr();
  kernels(frame.dtype).whiten_map(threads(), args);
  return frame.returned(y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("whiten_products", TORCH_BOX(&whiten_products));
  m.impl("whiten_map", TORCH_BOX(&whiten_map));
}
