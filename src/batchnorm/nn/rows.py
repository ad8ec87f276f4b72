"""Layers in which each sample chooses a row of `[K, C]` statistics, of `[K, C]` weight and bias, or of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import _checks, _options, functional, ops
from batchnorm.nn import batch
from batchnorm.nn.layer import NormLayer
from batchnorm.ops import strict
from batchnorm.ops.eager import values_per_channel

PlainBatchNorm = batch.BatchNorm | batch.BatchNorm1d | batch.BatchNorm2d | batch.BatchNorm3d


class RowsLayer(NormLayer):
    """A layer with `[K, C]` tensors instead of the `[C]` tensors of batch normalization."""

    def _make_rows(self, rows: int, names: tuple[str, ...]) -> None:
        """Give each of these parameters and buffers a leading dimension."""
        for name in names:
            tensor = getattr(self, name)
            if isinstance(tensor, torch.nn.Parameter):
                setattr(self, name, torch.nn.Parameter(_repeated(tensor.detach(), rows)))
            elif tensor is not None:
                setattr(self, name, _repeated(tensor, rows))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Copy `[C]` tensors from a checkpoint of plain batch normalization into every row."""
        tracked, key = self.num_batches_tracked, prefix + "num_batches_tracked"
        if (local_metadata.get("version") or 0) < 2 and tracked is not None and tracked.is_meta:
            # The checkpoint may have no counter. torch then adds one of shape [].
            state_dict.setdefault(key, torch.zeros(tracked.shape, dtype=tracked.dtype, device="cpu"))
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            given = state_dict.get(prefix + name)
            if own is not None and isinstance(given, Tensor) and own.dim() > 0 and given.shape == own.shape[1:]:
                state_dict[prefix + name] = _repeated(given, own.shape[0])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _plain(self, row: int) -> PlainBatchNorm:
        """Return a plain batch normalization layer with copies of one row."""
        kind = getattr(batch, f"BatchNorm{suffix}" if (suffix := self.layer_name[-2:]) in _RANKS else "BatchNorm")
        layer = kind(
            self.num_features, self.eps, self.momentum, self.weight is not None, self.track_running_stats,
            device="meta", bias=self.bias is not None, on_nonfinite=self.on_nonfinite, on_single=self.on_single,
            channel_dim=self.channel_dim,
        )  # fmt: skip
        for name, blank in (*layer.named_parameters(), *layer.named_buffers()):
            own = getattr(self, name)
            tensor = (own[row] if own.dim() > blank.dim() else own).detach().clone()
            if isinstance(blank, torch.nn.Parameter):
                tensor = torch.nn.Parameter(tensor, requires_grad=own.requires_grad)
            setattr(layer, name, tensor)
        layer.update_running_stats = self.update_running_stats
        return layer.train(self.training)

    def _normalize_by_rows(
        self,
        x: Tensor,
        choice: int | Tensor,
        rows: int,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        *,
        own_statistics: bool,
        choice_name: str,
    ) -> Tensor:
        """Return y, with the layer's settings for `batch_norm_by_rows`."""
        updates = self._updates_running
        held = updates or not self.training or self.on_single == "running"
        return batch_norm_by_rows(
            x, choice, rows, self.running_mean if held else None, self.running_var if held else None,
            self.num_batches_tracked if updates else None, weight, bias, mask, own_statistics=own_statistics,
            training=self.training or self.running_mean is None, momentum=self.momentum, eps=self.eps,
            on_nonfinite=self.on_nonfinite, on_single=self.on_single, update_running_stats=updates,
            channel_dim=self.channel_dim, caller=self.layer_name, name=choice_name,
        )  # fmt: skip


_RANKS = ("1d", "2d", "3d")


def _repeated(tensor: Tensor, rows: int) -> Tensor:
    return tensor.expand(rows, *tensor.shape).clone()


def batch_norm_by_rows(
    x: Tensor,
    choice: int | Tensor,
    rows: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None = None,
    *,
    own_statistics: bool,
    training: bool,
    momentum: float | None,
    eps: float,
    on_nonfinite: str,
    on_single: str,
    update_running_stats: bool,
    channel_dim: int,
    caller: str,
    name: str,
) -> Tensor:
    """Normalize each sample with its row of the statistics, of weight and bias, or of both.

    Args:
        x: `[N, C, *S]`, or `[N, *S, C]` if `channel_dim` is -1.
        choice: The row: an int for all samples, or int64 `[N]`, one for each sample.
        rows: K.
        running_mean: `[C]`, or `[K, C]` with `own_statistics`; None if there are no running statistics.
        running_var: Like `running_mean`.
        num_batches_tracked: A scalar, or `[K]`.
        weight: γ, `[C]` or `[K, C]`.
        bias: β, `[C]` or `[K, C]`.
        mask: As in `batch_norm`.
        own_statistics: Whether the samples of each row have separate statistics instead of those of the whole batch.
        training: Whether to normalize by the batch's statistics.
        momentum: Weight of the new batch.
        eps: Added to the variance.
        on_nonfinite: As in `batch_norm`.
        on_single: As in `batch_norm`, for each row that has separate statistics.
        update_running_stats: As in `batch_norm`.
        channel_dim: As in `batch_norm`.
        caller: The layer's name, for error messages.
        name: The layer's name for `choice`, for error messages.

    Returns:
        y of x's shape and dtype.
    """
    # This makes the call one node of an fx graph, as in `functional.batch_norm`.
    tensors = (x, choice, running_mean, running_var, num_batches_tracked, weight, bias, mask)
    if has_torch_function_variadic(*tensors):
        _checks.check_quantization(caller, training, x)
        return handle_torch_function(
            batch_norm_by_rows, tensors, x, choice, rows, running_mean, running_var, num_batches_tracked, weight, bias,
            mask, own_statistics=own_statistics, training=training, momentum=momentum, eps=eps,
            on_nonfinite=on_nonfinite, on_single=on_single, update_running_stats=update_running_stats,
            channel_dim=channel_dim, caller=caller, name=name,
        )  # fmt: skip
    _checks.check_input(caller, x, channel_dim)
    if x.dim() == 1:  # [0], without samples and channels, which torch accepts
        return x.clone()
    _options.check_eps(caller, eps, zero_allowed=not training)
    updates = training and update_running_stats and running_mean is not None
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    # Before a row is taken, whose error would be torch's own.
    _checks.check_allocated(caller, **vectors, num_batches_tracked=num_batches_tracked)
    if updates:  # before a row is taken, because rows may share memory
        _checks.check_update(caller, momentum, num_batches_tracked, running_mean=running_mean, running_var=running_var)
    if not isinstance(choice, Tensor):
        choice = checked_row(caller, name, choice, rows)
        if own_statistics:
            running_mean, running_var = _row(running_mean, choice), _row(running_var, choice)
            num_batches_tracked = _row(num_batches_tracked, choice)
        weight, bias = (_row(t, choice) if t is not None and t.dim() == 2 else t for t in (weight, bias))
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps,
            mask=mask, num_batches_tracked=num_batches_tracked, on_nonfinite=on_nonfinite, on_single=on_single,
            update_running_stats=update_running_stats, channel_dim=channel_dim, caller=caller,
        )  # fmt: skip

    _check_choice(caller, name, choice, rows, x)
    _checks.check_channel_vectors(
        caller, x, channel_dim, **{name: _one_row(vector) for name, vector in vectors.items()}
    )
    weights = None if mask is None else _checks.mask_as_weights(caller, x, mask, channel_dim)
    index = choice.expand(x.shape[0])
    fixed = not training or _checks.uses_running(caller, x, on_single, channel_dim)
    x = functional.channels_second(x, channel_dim)
    if fixed:
        assert running_mean is not None
        assert running_var is not None
        y = ops.fixed_statistics_norm(x, running_mean, running_var, weight, bias, None, eps, "none", 0.0, index)
        return functional.channels_back(y, channel_dim)
    in_one_call = strict.batch_norm_by_parts(
        x, (running_mean, running_var, num_batches_tracked) if updates else (None, None, None), weight, bias, None,
        index, weights, rows, not own_statistics, eps, "none", 0.0, momentum, on_nonfinite, on_single,
    )  # fmt: skip
    if in_one_call is not None:
        return functional.channels_back(in_one_call, channel_dim)
    where_single = None
    if on_single == "running":
        assert running_mean is not None
        assert running_var is not None
        where_single = running_mean, running_var
    y, statistics = ops.batch_statistics_norm_and_moments(
        x, weight, bias, None, eps, index=index, weights=weights, groups=rows, shared=not own_statistics,
        where_single=where_single,
    )  # fmt: skip
    _, mean, mean_low, var, count = (t.detach() for t in statistics)
    if on_nonfinite == "error":
        _checks.check_finite(caller, mean, mean_low, var, count=count)
    if updates:
        assert running_mean is not None
        assert running_var is not None
        buffers = (running_mean, running_var, num_batches_tracked)
        m, skip = values_per_channel(x), on_nonfinite != "propagate"
        if not own_statistics:
            ops.update_running_(*buffers, mean, mean_low, var, m, count, momentum, skip)
            return functional.channels_back(y, channel_dim)
        if ops.update_running_by_parts_(*buffers, statistics, momentum, skip):
            return functional.channels_back(y, channel_dim)
        for k in range(rows):  # a row without samples has count 0, which updates nothing
            r_mean, r_var, tracked = running_mean[k], running_var[k], _row(num_batches_tracked, k)
            ops.update_running_(r_mean, r_var, tracked, mean[k], mean_low[k], var[k], m, count[k], momentum, skip)
    return functional.channels_back(y, channel_dim)


def _row(t: Tensor | None, k: int) -> Tensor | None:
    return None if t is None else t[k]


def _one_row(t: Tensor | None) -> Tensor | None:
    """Return one row of `[K, C]`, for checks that expect `[C]`."""
    if t is None or t.dim() == 1:
        return t
    return t[0] if t.shape[0] else None


def checked_number_of_rows(requirement: str, rows: object, hint: str) -> int:
    """Return a number of rows as an int; it must be at least 1."""
    number = _options.as_integer(rows)
    if number is None or number < 1:
        raise ValueError(f"{requirement}, got {rows!r}. {hint}")
    return number


def checked_row(caller: str, name: str, row: object, rows: int) -> int:
    """Return a row as an int; it must be in `[0, rows)`."""
    number = _options.as_integer(row)
    if number is None:
        raise TypeError(
            f"{caller} expects {name} to be an int or an int64 tensor [N], got {row!r} ({type(row).__name__}). "
            f"Pass int(...), or a tensor with one {name} for each sample."
        )
    if not 0 <= number < rows:
        raise _outside(caller, name, number, rows)
    return number


def _outside(caller: str, name: str, row: int, rows: int) -> ValueError:
    return ValueError(
        f"{caller} expects {name} in [0, {rows}), got {row}. Count from 0, or create the layer with more {name}s."
    )


def _check_choice(caller: str, name: str, choice: Tensor, rows: int, x: Tensor) -> None:
    if choice.dtype != torch.int64:
        raise TypeError(f"{caller} expects {name} of dtype torch.int64, got {choice.dtype}. Use {name}.long().")
    if choice.dim() > 0 and choice.shape != x.shape[:1]:
        raise ValueError(
            f"{caller} expects {name} of shape [N] = [{x.shape[0]}] for x of shape {list(x.shape)}, got "
            f"{list(choice.shape)}. Pass one {name} for each sample, or an int for all."
        )
    if choice.device != x.device:
        raise ValueError(
            f"{caller} expects {name} on x's device, got {name} on {choice.device} and x on {x.device}. "
            f"Move it with {name}.to(x.device)."
        )
    _checks.check_allocated(caller, **{name: choice})
    # Values are checked here only if this does not wait for a device. Otherwise, the operators check them.
    if not _checks.can_be_read(choice) or not choice.numel():
        return
    low, high = (int(t) for t in choice.aminmax())
    if low < 0 or high >= rows:
        raise _outside(caller, name, low if low < 0 else high, rows)
