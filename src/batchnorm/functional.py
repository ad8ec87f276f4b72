"""Batch normalization as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchnorm._frameworks import required_by

with required_by("batchnorm.functional"):
    import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import _checks, _options, ops
from batchnorm.ops import strict
from batchnorm.ops.eager import values_per_channel

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    on_nonfinite: str = "propagate",
    on_single: str = "error",
    update_running_stats: bool = True,
    channel_dim: int = 1,
    caller: str = "batch_norm",
) -> Tensor:
    """Normalize each channel, then add `residual` and apply `activation`.

    `y = f((x - μ)/√(σ² + eps)·weight + bias + residual)`. In training, μ and σ² (biased) are those of the batch, and
    the running statistics are updated: `running ← (1 - momentum)·running + momentum·batch`, with the *unbiased* batch
    variance. Otherwise, μ and σ² are the running statistics. The positional arguments are the same as for
    `torch.nn.functional.batch_norm`.

    Args:
        input: x of shape `[N, C, *S]` (or `[N, *S, C]`, see `channel_dim`), any number of spatial dimensions; float64,
            float32, bfloat16 or float16; any memory layout. An empty batch gives an empty result and updates nothing.
        running_mean: `[C]`, updated in place in training; None if there are no running statistics.
        running_var: `[C]`, updated in the same way.
        weight: γ of shape `[C]`, or None for 1.
        bias: β of shape `[C]`, or None for 0.
        training: Whether to normalize by the batch's statistics instead of the running ones.
        momentum: Weight of the new batch, as in torch (1 minus the momentum of Keras and Flax). None gives the
            cumulative average, which needs `num_batches_tracked`.
        eps: Added to the variance; positive (in evaluation zero is allowed, as in torch).
        activation: The name of f, such as "relu", "leaky_relu", "silu" or "elu"; "none" is the identity. The page
            "Mathematics" lists all names, with formulas.
        negative_slope: Slope of "leaky_relu" below zero.
        alpha: α of "elu", which tends to -α below zero.
        residual: Of x's shape and dtype; added before the activation.
        mask: The positions that count in the statistics: booleans or weights w, of shape `[N, *S]` or broadcastable to
            it. Weights are >= 0, and the largest is from 1e-15 to 1e15. Positions that do not count (padding) may hold
            any value, even NaN (treated as 0), and are normalized like the rest. μ = Σw·x/Σw, σ² = Σw·(x - μ)²/Σw, and
            the unbiased variance is σ²·V₁²/(V₁² - V₂) with V₁ = Σw and V₂ = Σw². If no position counts, the running
            statistics do not change. If a single value counts, its output is β, and only the running mean is updated
            (see `on_single`). In evaluation, a mask has no effect.
        num_batches_tracked: int64 scalar that counts the updates of the running statistics.
        on_nonfinite: What training does if the batch's mean or variance is not finite, as after an overflow in float16:
            "propagate"; "skip" to skip the update of the running statistics and of their count; or "error" to raise
            FloatingPointError, and update nothing. "error" waits for the device in every call.
        on_single: How training handles a batch with one value per channel, which has no variance: "error", or
            "running" to normalize it by the running statistics, as in evaluation, and leave them and their count
            unchanged. With a mask, "running" also applies if at most one position counts.
        update_running_stats: Whether training updates the running statistics.
        channel_dim: The dimension of x that holds the channels: 1, or -1 for x and residual of shape `[N, *S, C]`, as
            in transformers. This costs no copy, and the result has x's layout. A mask is `[N, *S]` in both cases. With
            -1, x may be a jagged nested tensor `[N, j, *S, C]`. residual and mask then have the same structure.
        caller: The name at the start of error messages; a final "1d", "2d" or "3d" also determines x's rank.

    Returns:
        y of x's shape, dtype and memory format.

    Raises:
        TypeError: x is not a floating-point tensor, or the dtype of weight, bias, a running statistic or the residual
            does not match x's (vectors may be float32 if x is float16 or bfloat16).
        ValueError: x has the wrong rank; in training, x has one value per channel and on_single is "error"; a vector
            is not `[C]`; the residual's shape differs from x's; the mask does not broadcast to `[N, *S]` or has a
            weight below 0 (checked on the CPU, but not on other devices or in a compiled graph); eps, activation,
            alpha, on_nonfinite, on_single or channel_dim is invalid; a required statistic is missing.
        RuntimeError: under `torch.func`, running statistics are captured instead of passed as arguments; in training, a
            running statistic or the counter cannot be written (it is expanded, an inference tensor or a leaf that
            requires a gradient), and nothing is updated; the storage of a tensor was freed.
        FloatingPointError: in training with on_nonfinite="error", the batch's mean or variance is not finite; in
            compiled code, a RuntimeError, which on CUDA ends all use of the device by this process.

    Numerics:
        Statistics are accumulated in float32 (float64 for float64 x) as deviations from the mean. The mean is stored
        as a pair, so that even a mean of 1e6 standard deviations costs no accuracy. The result has the same bits for
        every number of CPU threads. With ReLU, autograd keeps x and `[C]` vectors, and with a residual also y.
        If σ² does not fit float32 (σ above 1.8e19), y is `bias` as in torch, or NaN for |x| above 1.7e38.
        on_nonfinite="error" raises an error instead.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2; the equations are on the mathematics page, "Forward".

    Examples:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> batch_norm(x, None, None, training=True, activation="relu")
        tensor([[0.0000, 0.0000],
                [1.0000, 1.0000]])
    """
    if mask is None and strict.accepts(training, eps, activation, alpha, on_nonfinite, on_single, channel_dim):
        y = strict.batch_norm(
            input, running_mean, running_var, weight, bias, training, update_running_stats, momentum, eps, activation,
            negative_slope, alpha, residual, num_batches_tracked, on_nonfinite, on_single, channel_dim, caller,
        )  # fmt: skip
        if y is not None:
            return y
    overridden = has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual, mask)
    if overridden or (isinstance(input, Tensor) and input.is_nested):
        fixed = (running_mean, running_var, weight, bias, training, momentum, eps)
        options: dict[str, Any] = {
            "activation": activation, "negative_slope": negative_slope, "alpha": alpha,
            "num_batches_tracked": num_batches_tracked, "on_nonfinite": on_nonfinite, "on_single": on_single,
            "update_running_stats": update_running_stats, "channel_dim": channel_dim, "caller": caller,
        }  # fmt: skip
        if overridden:  # makes the call one node of an fx graph; the wrapper of fx.wrap cannot be pickled
            _checks.check_quantization(caller, training, input)
            tensors = (input, running_mean, running_var, weight, bias, residual, mask)
            return handle_torch_function(batch_norm, tensors, input, *fixed, residual=residual, mask=mask, **options)

        def normalize(x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
            return batch_norm(x, *fixed, residual=residual, mask=mask, **options)

        return normalize_jagged(normalize, input, residual, mask, channel_dim, caller)
    _checks.check_channel_dim(caller, channel_dim)
    _checks.check_input(caller, input, channel_dim)
    if input.dim() == 1:  # [0], without samples and channels, which torch accepts
        return input.clone()
    _options.check_eps(caller, eps, zero_allowed=not training)
    _options.check_choice(caller, "activation", activation, ops.ACTIVATIONS)
    _options.check_alpha(caller, alpha)
    parameter = ops.parameter_of(activation, negative_slope=negative_slope, alpha=alpha)
    _options.check_choice(caller, "on_nonfinite", on_nonfinite, _options.ON_NONFINITE)
    _options.check_choice(caller, "on_single", on_single, _options.ON_SINGLE)
    _checks.check_running(caller, running_mean, running_var, needed=not training, on_single=on_single)
    updates = training and update_running_stats and running_mean is not None
    if updates:
        _checks.check_update(caller, momentum, num_batches_tracked, running_mean=running_mean, running_var=running_var)
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not tracing:  # sizes are tensors while tracing, and torch warns if a branch depends on them
        _checks.check_channel_vectors(
            caller, input, channel_dim, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
        )
        _checks.check_residual(caller, input, residual)
    if training and _checks.uses_running(caller, input, on_single, channel_dim):
        training = updates = False
    weights = None if mask is None else _checks.mask_as_weights(caller, input, mask, channel_dim)

    # A view in a layout that the kernels support (channels-last), so that they do not copy it.
    input = channels_second(input, channel_dim)
    residual = None if residual is None else channels_second(residual, channel_dim)
    if tracing or torch.compiler.is_exporting():
        y = _portable_batch_norm(
            input, running_mean, running_var, weight, bias, training, updates, momentum, eps, activation, parameter,
            residual, weights, num_batches_tracked, on_nonfinite, caller,
        )  # fmt: skip
        return channels_back(y, channel_dim)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        y = ops.fixed_statistics_norm(
            input, running_mean, running_var, weight, bias, residual, eps, activation, parameter
        )
        return channels_back(y, channel_dim)
    skips = on_nonfinite != "propagate"  # a device may report an error only after the update
    if weights is None and updates and on_nonfinite != "error":
        assert running_mean is not None
        assert running_var is not None
        y = ops.batch_statistics_norm_and_update_(
            input, weight, bias, residual, eps, activation, parameter,
            (running_mean, running_var, num_batches_tracked), momentum, skips,
        )  # fmt: skip
        return channels_back(y, channel_dim)
    count = None
    if weights is None:
        y, *found = ops.batch_statistics_norm(input, weight, bias, residual, eps, activation, parameter)
    else:
        buffers = (running_mean, running_var, num_batches_tracked) if updates else (None, None, None)
        in_one_call = strict.batch_norm_by_parts(
            input, buffers, weight, bias, residual, None, weights, 1, False, eps, activation, parameter, momentum,
            on_nonfinite, on_single,
        )  # fmt: skip
        if in_one_call is not None:
            return channels_back(in_one_call, channel_dim)
        where_single = None
        if on_single == "running":
            assert running_mean is not None
            assert running_var is not None
            where_single = running_mean, running_var
        y, statistics = ops.batch_statistics_norm_and_moments(
            input, weight, bias, residual, eps, activation, parameter, weights=weights, where_single=where_single
        )
        _, *found, count = (t.detach() for t in statistics)
    if on_nonfinite == "error":
        _checks.check_finite(caller, *found, count=count)
    if updates:
        ops.update_running_(
            running_mean, running_var, num_batches_tracked, *found, values_per_channel(input), count, momentum, skips
        )
    return channels_back(y, channel_dim)


def channels_second(x: Tensor, channel_dim: int) -> Tensor:
    """Return a view of x, whose channels are in `channel_dim`, as `[N, C, *S]`."""
    return x if channel_dim == 1 or x.dim() < 3 else x.movedim(channel_dim, 1)


def channels_back(y: Tensor, channel_dim: int) -> Tensor:
    """Undo `channels_second`."""
    return y if channel_dim == 1 or y.dim() < 3 else y.movedim(1, channel_dim)


def normalize_jagged(
    normalize: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    caller: str,
) -> Tensor:
    """Normalize a jagged nested x `[N, j, *S, C]` by its values `[1, total, *S, C]`, which contain no padding."""
    check_jagged(caller, x, channel_dim, residual=residual, mask=mask)
    residual, mask = (None if t is None else t.values().unsqueeze(0) for t in (residual, mask))
    y = normalize(x.values().unsqueeze(0), residual, mask).squeeze(0)
    return torch.nested.nested_tensor_from_jagged(y, x.offsets())  # type: ignore[attr-defined]


def check_jagged(caller: str, x: Tensor, channel_dim: int, **others: Tensor | None) -> None:
    """Check that a nested x is jagged `[N, j, *S, C]` without holes, and that `others` have its structure."""
    if x.layout != torch.jagged:
        came = "the strided layout"
    elif x._ragged_idx != 1 or x.dim() < 3:  # type: ignore[attr-defined]
        came = f"{list(x.shape)}"
    elif channel_dim != -1:
        came = f"channel_dim={channel_dim}"
    elif x.lengths() is not None:  # type: ignore[attr-defined]
        came = "a view with holes"
    else:
        for name, other in others.items():
            wanted = x.shape[:-1] if name == "mask" else x.shape
            if other is not None and (other.layout != torch.jagged or other.shape != wanted):
                strided = other.is_nested and other.layout != torch.jagged  # it has no shape
                raise ValueError(
                    f"{caller} expects {name} to be a jagged nested tensor of shape {list(wanted)}, as x, got "
                    f"{'the strided layout' if strided else list(other.shape)}. Make it with "
                    f"torch.nested.nested_tensor_from_jagged({name}_values, x.offsets())."
                )
        return
    raise ValueError(
        f"{caller} expects a nested x to be jagged and contiguous, [N, j, *S, C], with channel_dim=-1, got {came}. "
        "Otherwise pad it with x.to_padded_tensor(0.0), and pass a mask of the real positions."
    )


def _portable_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    updates: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    parameter: float,
    residual: Tensor | None,
    weights: Tensor | None,
    num_batches_tracked: Tensor | None,
    on_nonfinite: str,
    caller: str,
) -> Tensor:
    """Compute `batch_norm` by torch's own operations, so that an exported program loads without this library."""
    if training and weights is not None:
        raise ValueError(
            f"{caller} expects no mask in an exported training graph, got one. The graph uses torch's own batch_norm, "
            "which has no mask: leave it out, or export in evaluation mode."
        )
    if training and on_nonfinite != "propagate":
        raise ValueError(
            f"{caller} expects on_nonfinite='propagate' in an exported training graph, got {on_nonfinite!r}. The graph "
            "uses torch's own batch_norm, which has no such option: use 'propagate', or export in evaluation mode."
        )
    if training and not updates:
        running_mean = running_var = num_batches_tracked = None
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if not training or running_mean is None or momentum is not None:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
    else:  # the momentum of the cumulative average is a tensor, which F.batch_norm does not accept
        assert running_var is not None
        assert num_batches_tracked is not None
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
        rate = 1.0 / num_batches_tracked.to(running_mean.dtype)
        running_mean.copy_(torch.lerp(running_mean, mean, rate))
        running_var.copy_(torch.lerp(running_var, var, rate))
    if residual is not None:
        y = y + residual
    return ops.ACTIVATIONS[activation].forward(y, parameter)
