"""Observe the inputs of layers in a forward pass, and choose the statistics that they normalize by."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.moments import Moments
from batchnorm.nn.domain import DomainBatchNorm
from batchnorm.nn.layer import channels_second
from batchnorm.undo import overwrite
from batchnorm.walk import Found

# The moments of one layer's input: a single `Moments`, or one for each domain of the layer.
Rows = tuple[Moments, ...]
Mask = Tensor | Mapping[str, Tensor] | None


class LayerCall(NamedTuple):
    """The nth call of a layer in a forward pass; layers are numbered in the model's order."""

    layer: int
    nth: int


class Statistics(NamedTuple):
    """The mean and variance that a layer normalizes by: float64 `[K, C]`, with K > 1 only for layers with domains."""

    mean: Tensor
    var: Tensor


class Pass:
    """One forward pass, with the number of calls of each layer so far.

    Args:
        statistics_for: Returns the statistics that a layer normalizes by, from the call and the moments of its input.
        mask: The values of this batch that count, for layers that the model calls without a mask.

    Attributes:
        shape: The shape of the input of the first layer that was called; None before.
    """

    def __init__(self, statistics_for: Callable[[LayerCall, Rows], Statistics], mask: Mask = None) -> None:
        self.calls: Counter[int] = Counter()
        self.statistics_for = statistics_for
        self.mask = mask
        self.shape: torch.Size | None = None


class Observer:
    """Hooks on the layers; `current` is the running forward pass.

    The layers are in evaluation mode, and the hooks replace their running statistics before each call. Every class of
    batch normalization then behaves alike: it updates nothing, and does not communicate with other processes.
    """

    def __init__(self, caller: str, layers: Sequence[Found]) -> None:
        self._caller = caller
        self.layers = layers
        self.current: Pass | None = None

    def install(self) -> list[RemovableHandle]:
        """Add the hooks after existing ones, which may change the layer's input."""
        return [
            found.module.register_forward_pre_hook(self._hook_of(number), with_kwargs=True)
            for number, found in enumerate(self.layers)
        ]

    def _hook_of(self, number: int) -> Callable[..., None]:
        found = self.layers[number]
        layer = found.module
        parameters = inspect.signature(layer.forward)

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running = self.current
            if running is None:
                return
            given = parameters.bind(*args, **kwargs).arguments
            x: Tensor = channels_second(layer, args[0] if args else next(iter(given.values())))
            running.shape = running.shape or x.shape
            mask = given.get("mask")
            if mask is None:
                mask = _mask_for(self._caller, found, x, running.mask)
            domain = given.get("domain")
            if domain is None and isinstance(layer, DomainBatchNorm):
                domain = layer._current_domain()
            moments = _moments(x, mask, domain, _row_count(layer))
            call = LayerCall(number, running.calls[number])
            running.calls[number] += 1
            put_running_statistics(layer, running.statistics_for(call, moments))

        return hook


def running_buffer(layer: nn.Module, name: str) -> Tensor:
    """Return the layer's `running_mean` or `running_var`."""
    tensor: Tensor = getattr(layer, name)
    return tensor


def _row_count(layer: nn.Module) -> int:
    mean = running_buffer(layer, "running_mean")
    return mean.shape[0] if mean.dim() == 2 else 1


def running_statistics(layer: nn.Module) -> Statistics:
    """Return a copy of the layer's running statistics, float64 `[K, C]`."""
    device = "cpu" if running_buffer(layer, "running_mean").device.type == "mps" else None  # mps has no float64
    mean, var = (
        running_buffer(layer, name)
        .detach()
        .to(device=device, dtype=torch.float64, copy=True)
        .reshape(_row_count(layer), -1)
        for name in ("running_mean", "running_var")
    )
    return Statistics(mean, var)


def put_running_statistics(layer: nn.Module, statistics: Statistics) -> None:
    """Let the layer normalize by these statistics, in new buffers; `walk.restored` puts the former buffers back.

    The former buffers are not written, because they may be read-only, such as a memory map, or expanded.
    """
    for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
        former = running_buffer(layer, name)
        new = value.reshape(former.shape).to(former.device, former.dtype, copy=True)
        if name in layer._buffers:
            layer._buffers[name] = new
        else:
            overwrite(former, new)


def empty_moments(layer: nn.Module) -> Rows:
    """Return the moments of no data, for each row of the layer."""
    channels = running_buffer(layer, "running_mean").shape[-1]
    return tuple(Moments.empty(channels, device="cpu") for _ in range(_row_count(layer)))


def merged(first: Rows, *others: Rows) -> Rows:
    """Merge moments row by row."""
    return tuple(rows[0].merge(*rows[1:]) for rows in zip(first, *others, strict=True))


def _moments(x: Tensor, mask: Tensor | None, domain: int | Tensor | None, rows: int) -> Rows:
    if domain is None:
        return (_masked_moments(x, mask),)
    if not isinstance(domain, Tensor) or domain.dim() == 0:
        chosen = int(domain)
        return tuple(_masked_moments(x, mask) if row == chosen else Moments.empty(x.shape[1], device="cpu")
                     for row in range(rows))  # fmt: skip
    if mask is not None:
        mask = mask.expand(x.shape[0], *x.shape[2:])
    members = [domain == row for row in range(rows)]
    return tuple(_masked_moments(x[m], None if mask is None else mask[m]) for m in members)


def _masked_moments(x: Tensor, mask: Tensor | None) -> Moments:
    if mask is None:
        return Moments.of(x)
    return Moments.of(x, mask=mask) if mask.dtype == torch.bool else Moments.of(x, weights=mask)


def _mask_for(caller: str, found: Found, x: Tensor, mask: Mask) -> Tensor | None:
    """Return the user's mask in a shape that broadcasts to x's positions `[N, *S]`."""
    if isinstance(mask, Mapping):
        mask = next((mask[path] for path in found.paths if path in mask), None)
    if mask is None:
        return None
    mask = mask.to(x.device)
    positions = (x.shape[0], *x.shape[2:])
    if x.dim() == 2 and mask.numel() == x.shape[0]:  # the model has flattened positions into samples
        return mask.reshape(-1)
    if mask.shape[0] == x.shape[0] and mask.dim() <= len(positions):
        mask = mask.reshape(*mask.shape, *(1,) * (len(positions) - mask.dim()))
        if all(size in (1, wanted) for size, wanted in zip(mask.shape, positions, strict=True)):
            return mask
    raise ValueError(
        f"{caller} expects a mask that fits the input of {found.path!r}, {list(positions)} without channels, got "
        f"{list(mask.shape)}. Let mask= return a dict from the path of each layer to its own mask."
    )
