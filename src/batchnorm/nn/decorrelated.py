"""Batch normalization that also removes the correlation between channels (Huang et al. 2018, 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import _checks, _options, functional
from batchnorm.nn.layer import NormLayer
from batchnorm.ops import eager, whitening


def decorrelated_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_whitening: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    group_size: int = 64,
    iterations: int = 5,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    on_nonfinite: str = "propagate",
    on_single: str = "error",
    update_running_stats: bool = True,
    channel_dim: int = 1,
    caller: str = "decorrelated_batch_norm",
) -> Tensor:
    """Whiten each group of channels: `y = γ·W(x - μ) + β` with `W ≈ Σ^(-1/2)`.

    For a group of d channels with m values each: `Σ = (x - μ)(x - μ)ᵀ/m + eps·I`, `Σ_N = Σ/trΣ`, `P₀ = I`,
    `Pₖ₊₁ = ½(3Pₖ - Pₖ³Σ_N)`, `W = P_T/√trΣ`. In training, μ and W are those of the batch, and the running ones are
    updated: `running ← (1 - momentum)·running + momentum·batch`. Otherwise, μ and W are the running ones.

    Args:
        input: x of shape `[N, C, *S]`, any number of spatial dimensions; float64, float32, bfloat16 or float16; any
            memory layout. An empty batch gives an empty result and updates nothing.
        running_mean: `[C]`, updated in place in training; None if there are no running statistics.
        running_whitening: `[C, min(group_size, C)]`, updated in the same way. Row c contains channel c's coefficients
            for the channels of its group. The rows of a smaller last group end in zeros.
        weight: γ of shape `[C]`, or None for 1.
        bias: β of shape `[C]`, or None for 0.
        training: Whether to normalize by the batch's statistics instead of the running ones.
        momentum: Weight of the new batch, as in torch (1 minus the momentum of Keras and Flax). None gives the
            cumulative average, which needs `num_batches_tracked`.
        eps: Added to the diagonal of the covariance; positive.
        group_size: Number of channels that are whitened together, at least 1; the last group may be smaller.
        iterations: T, at least 1.
        mask: The positions that count in the statistics: booleans, or weights w >= 0, of shape `[N, *S]` or
            broadcastable to it. Positions that do not count (padding) are whitened like the rest; NaN and infinity
            there are treated as 0. If no position counts, the running statistics do not change. If a single value
            counts, only the running mean is updated (see `on_single`). In evaluation, a mask has no effect.
        num_batches_tracked: int64 scalar that counts the updates of the running statistics.
        on_nonfinite: As in `batchnorm.functional.batch_norm`, for the batch's mean and whitening matrices.
        on_single: As in `batchnorm.functional.batch_norm`.
        update_running_stats: Whether training updates the running statistics.
        channel_dim: As in `batchnorm.functional.batch_norm`.
        caller: The name at the start of error messages; a final "1d", "2d" or "3d" also determines x's rank.

    Returns:
        y of x's shape, dtype and memory format.

    Raises:
        TypeError: as `batchnorm.functional.batch_norm`; group_size or iterations is not an int.
        ValueError: as `batchnorm.functional.batch_norm`; group_size or iterations is below 1; running_whitening has
            another shape.
        RuntimeError: under `torch.func`, running statistics are captured instead of passed as arguments.

    Numerics:
        Everything is computed in float32 (float64 for float64 x), also under autocast. Deviations are measured from
        the mean, which is stored as a pair, so that a large mean costs no accuracy. The iteration is a stable form of
        the published one, which diverges after about ten steps.
    """
    # This also makes the call one node of an fx graph.
    if has_torch_function_variadic(input, running_mean, running_whitening, weight, bias, mask):
        _checks.check_quantization(caller, training, input)
        return handle_torch_function(
            decorrelated_batch_norm, (input, running_mean, running_whitening, weight, bias, mask), input, running_mean,
            running_whitening, weight, bias, training, momentum, eps, group_size=group_size, iterations=iterations,
            mask=mask, num_batches_tracked=num_batches_tracked, on_nonfinite=on_nonfinite, on_single=on_single,
            update_running_stats=update_running_stats, channel_dim=channel_dim, caller=caller,
        )  # fmt: skip
    x = input
    _checks.check_channel_dim(caller, channel_dim)
    _checks.check_input(caller, x, channel_dim)
    if x.dim() == 1:  # [0], without samples and channels, which torch accepts
        return x.clone()
    _options.check_eps(caller, eps, zero_allowed=not training)
    _options.check_choice(caller, "on_nonfinite", on_nonfinite, _options.ON_NONFINITE)
    _options.check_choice(caller, "on_single", on_single, _options.ON_SINGLE)
    group_size, iterations = _checked_options(caller, group_size, iterations)
    _checks.check_running(
        caller,
        running_mean,
        running_whitening,
        needed=not training,
        on_single=on_single,
        second_name="running_whitening",
    )
    updates = training and update_running_stats and running_mean is not None
    if updates:
        _checks.check_update(
            caller, momentum, num_batches_tracked, running_mean=running_mean, running_whitening=running_whitening
        )
    _checks.check_allocated(
        caller, x=x, weight=weight, bias=bias, running_mean=running_mean, running_whitening=running_whitening,
        num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    _checks.check_channel_vectors(caller, x, channel_dim, weight=weight, bias=bias, running_mean=running_mean)
    _check_whitening_shape(caller, x.shape[channel_dim], running_whitening, group_size)
    if x.shape[channel_dim] == 0:
        return x.clone()
    if training and _checks.uses_running(caller, x, on_single, channel_dim):
        training = updates = False
    weights = None if mask is None else _checks.mask_as_weights(caller, x, mask, channel_dim)

    from batchnorm.ops import whitening_function  # only this layer needs it, and importing the package loads all layers

    held: whitening.Held | None = None
    if not training or (on_single == "running" and weights is not None):
        assert running_mean is not None
        assert running_whitening is not None
        held = whitening.Held(*_detached(running_mean, running_whitening))
    settings = whitening.Settings(group_size, eps, iterations)
    x = functional.channels_second(x, channel_dim)
    y, found = whitening_function.whiten(x, weight, bias, weights if training else None, held, settings, training)
    checks = training and on_nonfinite == "error"
    if (updates or checks) and x.numel() > 0:
        wide = eager.wide_dtype(x)
        mean = (found.mean.to(wide) + found.low.to(wide)).detach()
        matrices = whitening.pack_matrices(found.matrices).detach()
        if checks:
            _checks.check_finite(caller, mean, matrices.abs().amax(1), count=found.effective_count)
        if updates:
            whitening.update_whitening_(
                running_mean, running_whitening, num_batches_tracked, mean, matrices, found.effective_count, momentum,
                on_nonfinite != "propagate",
            )  # fmt: skip
    return functional.channels_back(y, channel_dim)


def _detached(running_mean: Tensor, running_whitening: Tensor) -> tuple[Tensor, Tensor]:
    """Return the running statistics without gradient, copied if they may change before backward."""
    mean, matrices = running_mean.detach(), running_whitening.detach()
    # torch.jit.trace compares a trace with gradients to a trace without, and both must give the same graph.
    if not torch.is_grad_enabled() and not torch.jit.is_tracing():  # type: ignore[attr-defined]
        return mean.to(eager.statistics_dtype(mean)), matrices.to(eager.statistics_dtype(matrices))
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return torch.ops.batchnorm.copy_running(mean, matrices)  # a plain clone would be recomputed in backward
    return eager.copy_running(mean, matrices)


def _checked_options(caller: str, group_size: int, iterations: int) -> tuple[int, int]:
    hint = "It is the number of channels that are whitened together; 64 is common."
    group_size = _options.checked_integer(caller, "group_size", group_size, 1, hint)
    hint = "It is the number of Newton steps; 5 is common."
    return group_size, _options.checked_integer(caller, "iterations", iterations, 1, hint)


def _check_whitening_shape(caller: str, channels: int, matrices: Tensor | None, group_size: int) -> None:
    shape = (channels, min(group_size, channels))
    if matrices is not None and matrices.shape != shape:
        raise ValueError(
            f"{caller} expects running_whitening of shape [C, min(group_size, C)] = {list(shape)}, "
            f"got {list(matrices.shape)}. Use the group_size that it was created with."
        )


class _Decorrelated(NormLayer):
    running_whitening: Tensor | None

    # Class attributes, like the other options of a layer.
    group_size: int = 64
    iterations: int = 5

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        group_size: int = 64, iterations: int = 5,
    ) -> None:  # fmt: skip
        group_size, iterations = _checked_options(self.layer_name, group_size, iterations)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.group_size, self.iterations = group_size, iterations
        # Absent, not None, so that a tool that folds or replaces the layer fails instead of losing W.
        del self.running_var
        shape = (self.num_features, min(group_size, self.num_features))
        matrices = torch.empty(shape, device=device, dtype=dtype) if track_running_stats else None
        self.register_buffer("running_whitening", matrices)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running whitening matrices to I, and the number of batches to 0."""
        matrices = self._buffers.get("running_whitening")
        if matrices is None:  # not tracked, or called by torch's constructor, before the matrices exist
            return
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()
        matrices.copy_(self._diagonal(torch.ones_like(self.running_mean)))

    def _diagonal(self, values: Tensor) -> Tensor:
        """Return packed diagonal whitening matrices, which scale each channel by its entry of `values [C]`."""
        size = min(self.group_size, max(self.num_features, 1))
        return whitening.pack_matrices([torch.diag_embed(group) for group in whitening.in_groups(values, size)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        ours, theirs = prefix + "running_whitening", prefix + "running_var"
        var = state_dict.get(theirs)
        tracks = self._buffers.get("running_whitening") is not None
        if tracks and ours not in state_dict and isinstance(var, Tensor) and var.shape == (self.num_features,):
            invstd = (var.to(eager.wide_dtype(var)) + self.eps).rsqrt()
            state_dict[ours] = self._diagonal(invstd).to(eager.statistics_dtype(var))
            del state_dict[theirs]  # a variance of a wrong shape stays, so that torch raises its error
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y for x of the layer's shape; positions where `mask [N, *S]` is 0 do not enter the statistics."""
        running_mean, running_whitening, updates = self.running_mean, self.running_whitening, self._updates_running
        training = self.training or running_mean is None
        if running_mean is None or (self.training and not updates and self.on_single == "error"):
            running_mean = running_whitening = None
        return decorrelated_batch_norm(
            input, running_mean, running_whitening, self.weight, self.bias, training, self.momentum, self.eps,
            group_size=self.group_size, iterations=self.iterations, mask=mask,
            num_batches_tracked=self.num_batches_tracked if updates else None,
            on_nonfinite=self.on_nonfinite, on_single=self.on_single, update_running_stats=updates,
            channel_dim=self.channel_dim, caller=self.layer_name,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Describe the batch normalization, the groups and the iterations."""
        return f"{super().extra_repr()}, group_size={self.group_size}, iterations={self.iterations}"


class DecorrelatedBatchNorm(_Decorrelated, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization of `[N, C, *S]` that removes the correlation between channels of a group (IterNorm).

    `y = γ·W(x - μ) + β`, where W approximates `Σ^(-1/2)`, the inverse square root of the covariance of a group of
    channels, by `iterations` steps of Newton's method. `batchnorm.nn.decorrelated.decorrelated_batch_norm` has the
    equations. In training, μ and W are those of the batch, and the running ones are updated. In evaluation, they are
    the running ones. With `group_size=1`, the layer computes batch normalization.

    When the iteration has converged, the covariance of y / γ is the identity. After 5 iterations, a direction with 1/16
    of the group's total variance has variance 0.97 in the output, one with 1/64 has 0.59, and one with 1/1000 has 0.06,
    because each iteration amplifies by at most 1.5. This is intended: the smallest directions of a batch are noise.
    More iterations whiten more (after 10: 1.00, 1.00 and 0.95), and make training noisier. Groups should be much
    smaller than the number m = N·H·W of values per channel: with m <= d, the covariance of d channels is singular.

    Args:
        num_features: C. All arguments that are not listed here are those of `BatchNorm`.
        eps: Added to the diagonal of the covariance; positive.
        momentum: Weight of the new batch, for the mean and W.
        group_size: Number of channels that are whitened together; the last group may be smaller (keyword only). The
            paper uses 64 in ResNet-50.
        iterations: Steps of Newton's method, T in the paper (keyword only).

    Attributes:
        running_whitening: Buffer `[C, min(group_size, C)]`. Row c contains channel c's coefficients for the channels of
            its group. There is no `running_var`. A checkpoint of batch normalization loads: its variances become
            diagonal matrices, so that the layer computes the same as the original in evaluation.
        update_running_stats: As in `BatchNorm`.

    Shape:
        x and y: `[N, C, *S]`; an empty batch gives an empty y and updates nothing. mask, in forward: `[N, *S]`.

    Raises:
        TypeError: as `BatchNorm`; group_size or iterations is not an int.
        ValueError: as `BatchNorm`; group_size or iterations is below 1.

    Numerics: as `decorrelated_batch_norm`. On the CPU, autograd keeps x; elsewhere, its
    deviations, in float32 for half x.

    Source: Huang et al. 2019, Iterative Normalization, algorithm 1; Huang et al. 2018, Decorrelated Batch
    Normalization, for groups and the name. As published, the running averages are those of μ and W, without Bessel's
    correction.

    Examples:
        >>> x = torch.randn(512, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.9], [0.0, 0.5]], dtype=torch.float64)
        >>> y = DecorrelatedBatchNorm(2, iterations=10, dtype=torch.float64)(x).detach()
        >>> torch.allclose(y.T @ y / 512, torch.eye(2, dtype=torch.float64), atol=1e-3)
        True
    """

    layer_name = "DecorrelatedBatchNorm"


class DecorrelatedBatchNorm1d(_Decorrelated, torch.nn.modules.batchnorm._BatchNorm):
    """Whitening of `[N, C]` or `[N, C, L]`; arguments and equations are those of `DecorrelatedBatchNorm`."""

    layer_name = "DecorrelatedBatchNorm1d"


class DecorrelatedBatchNorm2d(_Decorrelated, torch.nn.modules.batchnorm._BatchNorm):
    """Whitening of `[N, C, H, W]`; arguments and equations are those of `DecorrelatedBatchNorm`.

    Examples:
        >>> DecorrelatedBatchNorm2d(80, group_size=32)(torch.rand(4, 80, 7, 7)).shape
        torch.Size([4, 80, 7, 7])
    """

    layer_name = "DecorrelatedBatchNorm2d"


class DecorrelatedBatchNorm3d(_Decorrelated, torch.nn.modules.batchnorm._BatchNorm):
    """Whitening of `[N, C, D, H, W]`; arguments and equations are those of `DecorrelatedBatchNorm`."""

    layer_name = "DecorrelatedBatchNorm3d"
