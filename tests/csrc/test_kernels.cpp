// Compares every kernel, in every instruction set that this processor has, with the oracle: over a table of shapes,
// random shapes and tensors too large for the caches. --quick tests fewer large cases.
#include <algorithm>
#include <cstdio>
#include <string>

#include "cases.h"
#include "compare.h"
#include "oracle.h"
#include "whitening.h"

namespace {

// With --quick, only every kOneIn-th case runs if it has more than kSmall values. The dtype and the layout still differ
// from shape to shape.
constexpr int64_t kSmall = 5000, kOneIn = 5;

// ---- one case ------------------------------------------------------------------------------------------------------

std::vector<double> x_values(const Case& c, Random& random) {
  std::vector<double> x = random.normals(c.shape.numel());
  Inputs in;
  in.shape = c.shape;
  in.each([&](int64_t i, int64_t, int64_t channel, int64_t) {
    if (c.values == Values::wide) x[i] *= 60.0;
    if (c.values == Values::offset) x[i] += c.offset * static_cast<double>(channel + 1);
    if (c.values == Values::constant && channel % 2 == 0) x[i] = 123.45678 * static_cast<double>(channel + 1);
  });
  return x;
}

void check_moments(const Case& c, const Inputs& base, Random& random) {
  const DType wide = statistics(c.dtype);
  const int64_t groups = std::max<int64_t>(c.groups, 1);
  std::vector<double> values = base.x;
  if (c.weights) {  // values with weight 0 may be anything
    base.each([&](int64_t i, int64_t n, int64_t, int64_t p) {
      if (base.position_weights[n * c.shape.s + p] == 0.0) values[i] = random.integer(0, 1) ? NAN : INFINITY;
    });
  }
  const Held x(c.dtype, values, c.skip), weights(wide, base.position_weights, c.skip);
  Inputs in = base;
  in.x = x.values;
  MomentsResult expected = moments(in, groups, c.weights);
  expected.m2.stored_as(wide);
  const int64_t all = groups * c.shape.c;
  check(c, "moments",
        {{"count", DType::float64, groups, &expected.count},
         {"mean", wide, all, &expected.mean},
         {"mean_low", wide, all, nullptr},
         {"m2", wide, all, &expected.m2}},
        [&](const Kernels& k, const Threads& threads, const Pointers& out) {
          k.moments(threads, {c.shape, x.data(), c.groups ? in.index.data() : nullptr, weights.data(c.weights), groups,
                              static_cast<double*>(out[0]), out[1], out[2], out[3]});
        });
}

// Checks that backward recomputes the same ReLU mask as forward, even if z is nothing but rounding error.
void check_mask(const Case& c, const Held& x, const Held& dy, const std::vector<double>& z,
                const Normalization& given) {
  const DType wide = statistics(c.dtype);
  const int64_t channels = c.shape.c, numel = c.shape.numel();
  std::vector<double> opposite(z.size());
  for (size_t i = 0; i < z.size(); ++i) opposite[i] = -z[i];
  const Held residual(c.dtype, opposite, c.skip);
  for (const std::string& capability : capability_names()) {
    set_capability(capability.c_str());
    const Kernels& k = kernels(c.dtype);
    Buffer y(c.dtype, numel, c.skip), mean(wide, channels), low(wide, channels), var(wide, channels);
    Normalization n = given;
    n.activation = Activation::relu;
    k.train_forward(kThreads[0],
                    {c.shape, x.data(), residual.data(), n, y.data(), mean.data(), low.data(), var.data()});
    n.mean = {mean.data(), wide, 1}, n.mean_low = {low.data(), wide, 1}, n.var = {var.data(), wide, 1};
    std::vector<Buffer> results;
    for (const bool from_y : {false, true}) {
      Backward args{};
      args.shape = c.shape, args.x = x.data(), args.dy = dy.data(), args.normalization = n, args.groups = 1;
      (from_y ? args.y : args.residual) = from_y ? y.data() : residual.data();
      args.through_batch = true;
      args.sum_dz = results.emplace_back(wide, channels).data();
      args.sum_dz_xhat = results.emplace_back(wide, channels).data();
      args.dx = results.emplace_back(c.dtype, numel, c.skip).data();
      args.dz = results.emplace_back(c.dtype, numel, c.skip).data();
      k.backward(kThreads[0], args);
    }
    bool same = true;
    for (int i = 0; i < 4; ++i) same = same && results[i].same_bits(results[i + 4]);
    judge(capability + " mask " + c.name(), same ? "" : "recomputed from x it is not the forward pass's");
  }
}

void check_case(const Case& c, uint64_t seed) {
  Random random{std::mt19937_64(seed)};
  const DType wide = statistics(c.dtype), parameter = c.parameters_as_x ? c.dtype : wide;
  const int64_t numel = c.shape.numel(), rows = std::max<int64_t>(c.groups, 1), all = rows * c.shape.c;
  const Held x(c.dtype, x_values(c, random), c.skip), dy(c.dtype, random.normals(numel), c.skip);
  const Held residual(c.dtype, random.normals(numel), c.skip);
  const Held weight(parameter, random.uniforms(all, -1.5, 1.5), c.skip), bias(parameter, random.uniforms(all, -1, 1));
  Inputs in;
  in.shape = c.shape, in.dtype = c.dtype, in.activation = c.activation, in.x = x.values, in.dy = dy.values;
  if (c.groups) {  // the last group stays empty
    for (int64_t n = 0; n < c.shape.n; ++n) in.index.push_back(random.integer(0, std::max<int64_t>(c.groups - 2, 0)));
  }
  if (c.weights) {
    std::vector<double> w = random.uniforms(c.shape.n * c.shape.s, -0.5, 2.0);
    for (double& e : w) e = std::max(e, 0.0);
    in.position_weights = Held(wide, w).values;
  }
  check_moments(c, in, random);
  check_whitening(c, in, x, dy, random);
  if (c.residual) in.residual = residual.values;
  if (c.weight) in.weight = weight.values;
  if (c.bias) in.bias = bias.values;

  Normalization n{};
  n.weight = weight.vector(rows, c.weight), n.bias = bias.vector(rows, c.bias);
  n.eps = in.eps, n.activation = c.activation, n.parameter = in.parameter;
  n.index = c.groups ? in.index.data() : nullptr;
  const bool plain = !c.groups && !c.weights;
  const int64_t groups = c.shared ? 1 : rows, statistics_size = groups * c.shape.c;
  Inputs counted = in;
  if (c.shared) counted.index.clear();
  const MomentsResult batch = moments(counted, groups, c.weights);
  Result counts = batch.count, var = batch.m2;
  counts.resize(2 * groups);
  for (int64_t i = 0; i < c.shape.n; ++i) {
    for (int64_t p = 0; p < c.shape.s; ++p) {
      const double w = c.weights ? in.position_weights[i * c.shape.s + p] : 1.0;
      counts.value[counted.row(i)] += w, counts.value[groups + counted.row(i)] += w * w;
    }
  }
  for (double& t : counts.tolerance) t = 1e-13 * static_cast<double>(c.shape.n * c.shape.s);
  for (int64_t i = 0; i < statistics_size; ++i) {
    const double share = 1.0 / std::max(counts.value[i / c.shape.c], 1e-300);
    var.value[i] *= share, var.tolerance[i] *= share;
  }
  const std::vector<double> batch_var = var.value;

  Inputs own = in;
  own.own_statistics = true, own.mean = batch.first, own.mean_low = batch.delta, own.var = batch_var;
  for (double& v : own.mean) v = std::isnan(v) ? 0.0 : v;
  {
    Result y = normalize(own);
    y.stored_as(c.dtype), var.stored_as(wide);
    std::vector<Output> outputs = {{"y", c.dtype, numel, &y},
                                   {"mean", wide, statistics_size, &batch.mean},
                                   {"mean_low", wide, statistics_size, nullptr},
                                   {"var", wide, statistics_size, &var}};
    const Held position_weights(wide, in.position_weights, c.skip);
    if (!plain) outputs.push_back({"count", DType::float64, 2 * groups, &counts});
    check(c, "train_forward", outputs, [&](const Kernels& k, const Threads& threads, const Pointers& out) {
      TrainForward args{c.shape, x.data(), residual.data(c.residual), n, out[0], out[1], out[2], out[3]};
      if (c.groups && !c.shared) args.groups = groups;
      args.weights = position_weights.data(c.weights);
      if (!plain) args.count = static_cast<double*>(out[4]);
      k.train_forward(threads, args);
    });
  }
  if (plain) {
    if (c.activation == Activation::relu && c.dtype != DType::float16) {  // whose tiny values round to zero
      Inputs bare = own;
      bare.residual.clear();
      check_mask(c, x, dy, preactivation(bare).value, n);
    }
  }

  // The statistics of the batch, or running statistics near them.
  std::vector<double> high(statistics_size), low(statistics_size), spread = random.uniforms(statistics_size, 0.5, 2.0);
  for (int64_t i = 0; i < statistics_size; ++i) {
    const double first = std::isnan(batch.first[i]) ? 0.0 : batch.first[i] + (plain ? 0.0 : random.uniform(-1, 1));
    high[i] = rounded(c.dtype, first + batch.delta[i]), low[i] = (first - high[i]) + batch.delta[i];
  }
  const bool running = c.dz;  // some cases without a low part
  const Held mean(wide, high), mean_low(wide, low), variance(wide, plain ? batch_var : spread);
  in.mean = mean.values, in.var = variance.values;
  if (!running) in.mean_low = mean_low.values;
  n.mean = mean.vector(groups), n.mean_low = mean_low.vector(groups, !running), n.var = variance.vector(groups);
  Result y = normalize(in);
  const Held kept_y(c.dtype, y.value, c.skip);
  y.stored_as(c.dtype);
  check(c, "normalize", {{"y", c.dtype, numel, &y}},
        [&](const Kernels& k, const Threads& threads, const Pointers& out) {
          k.normalize(threads, {c.shape, x.data(), residual.data(c.residual), n, out[0]});
        });

  if (c.y) in.y = kept_y.values, in.residual.clear();
  const Held position_weights(wide, in.position_weights, c.skip);
  const Result dz = dz_of(in);
  Backward args{};
  args.shape = c.shape, args.dy = dy.data(), args.x = x.data(), args.normalization = n, args.groups = rows;
  args.residual = residual.data(c.residual && !c.y), args.y = kept_y.data(c.y);
  const SumsResult exact = sums_of(in, dz, rows);
  SumsResult sums = exact;
  sums.dz.stored_as(wide), sums.dz_xhat.stored_as(wide);
  Result stored_dz = dz;
  stored_dz.stored_as(c.dtype);

  // Calls backward for those of the sums, dx and dz that are requested.
  auto check_backward = [&](const char* kernel, const Backward& given, bool with_sums, Result* dx) {
    std::vector<Output> outputs;
    if (with_sums) outputs = {{"sum_dz", wide, all, &sums.dz}, {"sum_dz_xhat", wide, all, &sums.dz_xhat}};
    if (dx) dx->stored_as(c.dtype), outputs.push_back({"dx", c.dtype, numel, dx});
    if (dx && c.dz) outputs.push_back({"dz", c.dtype, numel, &stored_dz});
    check(c, kernel, outputs, [&](const Kernels& k, const Threads& threads, const Pointers& out) {
      Backward call = given;
      size_t next = 0;
      if (with_sums) call.sum_dz = out[next++], call.sum_dz_xhat = out[next++];
      if (dx) call.dx = out[next++];
      if (dx && c.dz) call.dz = out[next++];
      k.backward(threads, call);
    });
  };

  check_backward("backward_reduce", args, true, nullptr);
  Result held = dx_of(in, dz, {}, {}, false);
  check_backward("normalize_backward", args, true, &held);
  {  // the means of dxhat and dxhat·xhat over the samples that share statistics
    Result a, b;
    for (auto [means, found] : {std::pair{&a, &exact.dz}, std::pair{&b, &exact.dz_xhat}}) {
      means->resize(statistics_size);
      for (int64_t i = 0; i < all; ++i) {
        const int64_t to = i % statistics_size;
        const double divisor = counts.value[to / c.shape.c];
        const double share = divisor > 0.0 ? (c.weight ? in.weight[i] : 1.0) / divisor : 0.0;
        means->value[to] += share * found->value[i], means->tolerance[to] += std::abs(share) * found->tolerance[i];
      }
    }
    Backward call = args;
    call.through_batch = true;
    const bool summed_by_kernel = c.weights && !c.groups && c.y;
    if (!plain && !summed_by_kernel) call.count = counts.value.data();
    call.weights = position_weights.data(c.weights);
    Result dx = dx_of(in, dz, a, b, c.weights);
    check_backward("train_backward", call, true, &dx);
  }
  const Held a(wide, random.normals(all)), b(wide, random.normals(all));
  args.mean_dxhat = a.vector(rows), args.mean_dxhat_xhat = b.vector(rows);
  args.weights = position_weights.data(c.weights);
  const Result mean_a{a.values, std::vector<double>(all)}, mean_b{b.values, std::vector<double>(all)};
  Result dx = dx_of(in, dz, mean_a, mean_b, c.weights);
  check_backward("backward_apply", args, false, &dx);
}

// ---- tensors larger than the caches ---------------------------------------------------------------------------------

// Runs forward and backward. Two channels are compared with the oracle, the others with another number of threads.
void check_large(DType dtype, const Shape& shape) {
  Case c{shape, dtype, Activation::relu};
  const bool channels_last = shape.channels_last;
  constexpr int64_t kFew = 2, kChosen[kFew] = {0, 17}, kPeriod = 65521;
  Random random{std::mt19937_64(1)};
  const DType wide = statistics(dtype);
  const Shape& s = c.shape;
  const Held piece(dtype, random.normals(kPeriod)), weight(wide, random.uniforms(s.c, -1.5, 1.5));
  const int64_t numel = s.numel(), width = size_of(dtype), shift = 999;
  Buffer x(dtype, numel), dy(dtype, numel);
  for (int64_t i = 0; i < numel; i += kPeriod) {
    std::memcpy(static_cast<char*>(x.data()) + i * width, piece.data(), std::min(kPeriod, numel - i) * width);
  }
  std::memcpy(dy.data(), static_cast<char*>(x.data()) + shift * width, (numel - shift) * width);
  std::memcpy(static_cast<char*>(dy.data()) + (numel - shift) * width, x.data(), shift * width);

  Inputs in;
  in.shape = {s.n, kFew, s.s, false}, in.dtype = dtype, in.activation = c.activation, in.own_statistics = true;
  std::vector<int64_t> chosen;
  in.each([&](int64_t, int64_t n, int64_t k, int64_t p) {
    chosen.push_back(channels_last ? (n * s.s + p) * s.c + kChosen[k] : (n * s.c + kChosen[k]) * s.s + p);
    in.x.push_back(x.get(chosen.back())), in.dy.push_back(dy.get(chosen.back()));
  });
  for (int64_t k : kChosen) in.weight.push_back(weight.values[k]);
  const double m = static_cast<double>(s.n * s.s);
  const MomentsResult batch = moments(in, 1, false);
  in.mean = batch.first, in.mean_low = batch.delta, in.var = batch.m2.value;
  for (double& v : in.var) v /= m;
  Result y = normalize(in);
  const Result dz = dz_of(in);
  SumsResult means = sums_of(in, dz, 1);
  for (Result* r : {&means.dz, &means.dz_xhat}) {
    for (int64_t k = 0; k < kFew; ++k) r->value[k] *= in.weight[k] / m, r->tolerance[k] *= std::abs(in.weight[k]) / m;
  }
  Result dx = dx_of(in, dz, means.dz, means.dz_xhat, false), stored_dz = dz;
  y.stored_as(dtype), dx.stored_as(dtype), stored_dz.stored_as(dtype);
  check(
      c, "large", {{"y", dtype, numel, &y}, {"dx", dtype, numel, &dx}, {"dz", dtype, numel, &stored_dz}},
      [&](const Kernels& k, const Threads& threads, const Pointers& out) {
        Buffer mean(wide, s.c), low(wide, s.c), var(wide, s.c), sum_dz(wide, s.c), sum_dz_xhat(wide, s.c);
        Backward args{};
        Normalization& n = args.normalization;
        n.weight = weight.vector(1), n.eps = in.eps, n.activation = c.activation;
        k.train_forward(threads, {s, x.data(), nullptr, n, out[0], mean.data(), low.data(), var.data()});
        n.mean = {mean.data(), wide, 1}, n.mean_low = {low.data(), wide, 1}, n.var = {var.data(), wide, 1};
        args.shape = s, args.dy = dy.data(), args.x = x.data(), args.groups = 1, args.through_batch = true;
        args.sum_dz = sum_dz.data(), args.sum_dz_xhat = sum_dz_xhat.data(), args.dx = out[1], args.dz = out[2];
        k.backward(threads, args);
      },
      &chosen);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc == 2 && std::string(argv[1]) == "--quick";
  if (argc > 1 && !quick) {
    std::fprintf(stderr, "%s takes no argument but --quick.\n", argv[0]);
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 4096);  // print failures even if a later case crashes
  const std::vector<Case> cases = table();
  for (size_t i = 0; i < cases.size(); ++i) {
    if (!quick || cases[i].shape.numel() <= kSmall || i % kOneIn == 0) check_case(cases[i], i);
  }
  for (DType dtype : kAllDTypes) {
    if (quick && dtype != DType::float32) continue;
    // Large enough to bypass the caches. Rows end within a cache line: long rows, and short rows, two or three of which
    // may share a vector. Rows of 49 are processed as columns if the channels are a multiple of 32.
    const int64_t values = (int64_t{10} << 20) / size_of(dtype), narrow = size_of(dtype) == 8 ? 5 : 9;
    check_large(dtype, {2, 32, values / 64 + 1, false});
    check_large(dtype, {3, values / (3 * 49) + 1, 49, false});
    check_large(dtype, {3, (values / (3 * 49) / 32 + 1) * 32, 49, false});
    check_large(dtype, {2, values / (2 * narrow) + 1, narrow, false});
    check_large(dtype, {2, 32, values / 64, true});
  }
  std::printf("%s: largest error %.2f of its tolerance (%s)\n", capabilities(), worst, worst_where.c_str());
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
  return failed > 0;
}
