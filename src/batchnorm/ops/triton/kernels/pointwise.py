"""Compute z and y from x, and dz from dy, by expressions that forward and backward share.

Backward recomputes the ReLU's mask. It must get the same bits as forward. Therefore both call these functions, in which
the source explicitly fuses every product that a compiler might fuse with a sum.
"""

import triton
import triton.language as tl

from .tiles import load, samples_of


@triton.jit
def vector(ptr, at, valid, default, like):
    """Return a vector in float32, or `default` if there is none."""
    # One expression, because Triton also compiles the code after a `return`, where an absent pointer is an error.
    return tl.zeros_like(like) + default if ptr is None else tl.load(ptr + at, valid, float("nan")).to(tl.float32)


@triton.jit
def scale_and_shift(mean_low, var, weight, bias, eps):
    """Return 1/√(var + ε), scale and shift, where z = (x − mean)·scale + shift."""
    deviation = tl.sqrt_rn(var + eps)
    scale = tl.div_rn(weight, deviation)
    return tl.div_rn(tl.zeros_like(var) + 1.0, deviation), scale, tl.fma(-mean_low, scale, bias)


@triton.jit
def coefficients(vectors, row, channel, valid, stride_statistic, stride_affine, eps):
    """Return mean, mean_low, 1/√(var + ε), scale and shift of a row's channels; NaN where `valid` is false."""
    mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr = vectors
    statistic = row * stride_statistic + channel
    affine = row * stride_affine + channel
    mean = tl.load(mean_ptr + statistic, valid, float("nan")).to(tl.float32)
    var = tl.load(var_ptr + statistic, valid, float("nan")).to(tl.float32)
    mean_low = vector(mean_low_ptr, statistic, valid, 0.0, var)
    weight = vector(weight_ptr, affine, valid, 1.0, var)
    bias = vector(bias_ptr, affine, valid, 0.0, var)
    invstd, scale, shift = scale_and_shift(mean_low, var, weight, bias, eps)
    return mean, mean_low, invstd, scale, shift


@triton.jit
def coefficients_of_lines(source, constants, k, end, place):
    """Return the rows of lines k, a mask of their existing channels, and their coefficients.

    Without an index, all lines have the coefficients `constants`.
    """
    index_ptr, vectors, rows, channel, valid, stride_statistic, stride_affine, eps = source
    if index_ptr is None:
        row, existing, found = 0, valid, constants
    else:
        row = tl.load(index_ptr + samples_of(k, place), k < end, 0)
        existing = valid & (row >= 0) & (row < rows)
        found = coefficients(vectors, row, channel, existing, stride_statistic, stride_affine, eps)
    return row, existing, found


@triton.jit
def preactivation(x, mean, scale, shift, residual_ptr, offset, mask, LAST: tl.constexpr):
    """Return z of a tile."""
    z = x - mean
    z = tl.fma(z, tl.zeros_like(z) + scale, tl.zeros_like(z) + shift)
    if residual_ptr is not None:
        z += load(residual_ptr, offset, mask, LAST)
    return z


@triton.jit
def expm1_near_zero(x):
    """Return eˣ − 1 for −0.5 <= x <= 0 by a Taylor series, because the difference would lose digits."""
    p = tl.zeros_like(x) + 1.0 / 40320.0
    p = p * x + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    return p * x * x + x


@triton.jit
def expm1_of_negative(x):
    """Return eˣ − 1 for x <= 0."""
    return tl.where(x < -0.5, tl.exp(x) - 1.0, expm1_near_zero(x))


@triton.jit
def sigmoid(z):
    """Return 1/(1 + e^(−z)), by e^(−|z|). Near zero, the GPU's exponential and division alone err by several units."""
    x = tl.where(z < 0.0, z, -z)
    e = tl.where(x < -0.5, tl.exp(x), 1.0 + expm1_near_zero(x))
    return tl.div_rn(tl.where(z < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def tanh(z):
    """Return the hyperbolic tangent, by tanh |z| = −u/(u + 2) with u = e^(−2|z|) − 1."""
    u = expm1_of_negative(tl.where(z < 0.0, z, -z) * 2.0)
    magnitude = -u / (u + 2.0)
    return tl.where(z < 0.0, -magnitude, magnitude)


@triton.jit
def activate(z, parameter, ACTIVATION: tl.constexpr):
    """Return y = f(z), with torch's results at kinks and for NaN."""
    y = z
    if ACTIVATION == "relu":
        y = tl.maximum(z, 0.0, tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = tl.minimum(tl.maximum(z, 0.0, tl.PropagateNan.ALL), 6.0, tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0.0, z, z * parameter)
    elif ACTIVATION == "silu":
        y = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        y = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        gate = z + 3.0
        y = z * tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) / 6.0
    elif ACTIVATION == "mish":  # tanh(log(1 + e^z)) is w/(w + 2), and 1 for z >= 20
        e = tl.exp(tl.where(z > 20.0, 20.0, z))
        w = e * (e + 2.0)
        y = z * (w / (w + 2.0))
    elif ACTIVATION == "hardsigmoid":
        gate = z + 3.0
        y = tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) / 6.0
    elif ACTIVATION == "tanh":
        y = tanh(z)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(z)
    elif ACTIVATION == "elu":
        y = tl.where(z > 0.0, z, parameter * expm1_of_negative(tl.where(z > 0.0, 0.0, z)))
    else:
        tl.static_assert(ACTIVATION == "none")
    return y


@triton.jit
def derivative(dy, t, parameter, ACTIVATION: tl.constexpr):
    """Return dz = dy·f′(t). t is z, or y if y determines f′."""
    dz = dy
    if ACTIVATION == "relu":
        dz = tl.where(t <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu6":
        dz = tl.where((t <= 0.0) | (t >= 6.0), 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        dz = tl.where(t > 0.0, dy, dy * parameter)
    elif ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp(-t))
        dz = dy * gate * (1.0 + t * (1.0 - gate))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(t * 0.7071067811865476))
        dz = dy * (cdf + t * 0.3989422804014327 * tl.exp(-0.5 * t * t))
    elif ACTIVATION == "hardswish":
        dz = tl.where(t <= -3.0, 0.0, tl.where(t >= 3.0, dy, dy * (t / 3.0 + 0.5)))
    elif ACTIVATION == "mish":
        z = tl.where(t > 20.0, 20.0, t)
        e = tl.exp(z)
        w = e * (e + 2.0)
        n = w + 2.0
        dz = dy * (w / n + z * (e / (e + 1.0)) * (4.0 * (w + 1.0) / (n * n)))
    elif ACTIVATION == "hardsigmoid":
        dz = tl.where((t > -3.0) & (t < 3.0), dy / 6.0, 0.0)
    elif ACTIVATION == "tanh":
        y = tanh(t)
        dz = dy * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(t)
        dz = dy * (y * (1.0 - y))
    elif ACTIVATION == "elu":
        dz = tl.where(t <= 0.0, dy * (parameter * tl.exp(t)), dy)
    else:
        tl.static_assert(ACTIVATION == "none")
    return dz


@triton.jit
def load_x_and_dz(
    data, offset, mask, mean, scale, shift, parameter,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Return x and dz of a tile, from y if it was kept, else from a recomputed z.

    With `MASKED`, dz is zero outside the mask.
    """
    dy_ptr, x_ptr, residual_ptr, y_ptr = data
    dz = load(dy_ptr, offset, mask, LAST)
    x = load(x_ptr, offset, mask, LAST)
    if ACTIVATION != "none":
        if y_ptr is not None:
            t = load(y_ptr, offset, mask, LAST)
        else:
            t = preactivation(x, mean, scale, shift, residual_ptr, offset, mask, LAST)
        dz = derivative(dz, t, parameter, ACTIVATION)
    if MASKED:
        dz = tl.where(mask, dz, 0.0)
    return x, dz
