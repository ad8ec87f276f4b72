"""What the layers are given in a forward pass, and what they normalize it by."""

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
from batchnorm.walk import Found

# Of one layer: a single Moments, or one for each domain that it keeps statistics of.
Rows = tuple[Moments, ...]
Mask = Tensor | Mapping[str, Tensor] | None


class Call(NamedTuple):
    """The nth call of a layer in one forward pass; layers are numbered in the model's order."""

    layer: int
    nth: int


class Statistics(NamedTuple):
    """What a layer normalizes by: float64 `[K, C]`, K = 1 for all but layers with domains."""

    mean: Tensor
    var: Tensor


class Pass:
    """One forward pass: counts the calls of each layer, and decides what they normalize by.

    Args:
        meet: Is told of each call and the moments of its input; returns what the layer shall normalize by.
        mask: Which values of this batch count, for layers that are not given a mask by the model.
    """

    def __init__(self, meet: Callable[[Call, Rows], Statistics], mask: Mask = None) -> None:
        self.calls: Counter[int] = Counter()
        self.meet = meet
        self.mask = mask


class Observer:
    """Hooks on the layers; whose forward pass is running is said in `current`.

    The layers are in evaluation, and normalize by what is put into their running statistics just before. So every
    class of batch normalization does the same, without moving anything or speaking to other processes.
    """

    def __init__(self, layers: Sequence[Found]) -> None:
        self.layers = layers
        self.current: Pass | None = None

    def install(self) -> list[RemovableHandle]:
        """Add the hooks, after those that may change what the layer is given."""
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
            going = self.current
            if going is None:
                return
            given = parameters.bind(*args, **kwargs).arguments
            x: Tensor = args[0] if args else next(iter(given.values()))
            mask = given.get("mask")
            if mask is None:
                mask = _mask_for(found, x, going.mask)
            domain = given.get("domain")
            if domain is None and isinstance(layer, DomainBatchNorm):
                domain = layer._current_domain()
            moments = _moments(x, mask, domain, _rows_held(layer))
            call = Call(number, going.calls[number])
            going.calls[number] += 1
            put(layer, going.meet(call, moments))

        return hook


def running(layer: nn.Module, name: str) -> Tensor:
    """A running statistic of the layer."""
    tensor: Tensor = getattr(layer, name)
    return tensor


def _rows_held(layer: nn.Module) -> int:
    mean = running(layer, "running_mean")
    return mean.shape[0] if mean.dim() == 2 else 1


def held(layer: nn.Module) -> Statistics:
    """What the layer's running statistics are, float64 `[K, C]`."""
    device = "cpu" if running(layer, "running_mean").device.type == "mps" else None  # which has no float64
    mean, var = (
        running(layer, name).detach().to(device=device, dtype=torch.float64, copy=True).reshape(_rows_held(layer), -1)
        for name in ("running_mean", "running_var")
    )
    return Statistics(mean, var)


def put(layer: nn.Module, statistics: Statistics) -> None:
    """Make them the layer's running statistics."""
    with torch.no_grad():
        for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
            tensor = running(layer, name)
            tensor.copy_(value.reshape(tensor.shape))


def nothing(layer: nn.Module) -> Rows:
    """Moments of no data, for each row of the layer."""
    channels = running(layer, "running_mean").shape[-1]
    return tuple(Moments.empty(channels, device="cpu") for _ in range(_rows_held(layer)))


def merged(first: Rows, *others: Rows) -> Rows:
    """The moments of all together, row by row."""
    return tuple(rows[0].merge(*rows[1:]) for rows in zip(first, *others, strict=True))


def _moments(x: Tensor, mask: Tensor | None, domain: int | Tensor | None, rows: int) -> Rows:
    if domain is None:
        return (_of(x, mask),)
    if not isinstance(domain, Tensor) or domain.dim() == 0:
        chosen = int(domain)
        return tuple(_of(x, mask) if row == chosen else Moments.empty(x.shape[1], device="cpu")
                     for row in range(rows))  # fmt: skip
    if mask is not None:
        mask = mask.expand(x.shape[0], *x.shape[2:])
    members = [domain == row for row in range(rows)]
    return tuple(_of(x[m], None if mask is None else mask[m]) for m in members)


def _of(x: Tensor, mask: Tensor | None) -> Moments:
    if mask is None:
        return Moments.of(x)
    return Moments.of(x, mask=mask) if mask.dtype == torch.bool else Moments.of(x, weights=mask)


def _mask_for(found: Found, x: Tensor, mask: Mask) -> Tensor | None:
    """The user's mask in a shape that broadcasts to x's positions `[N, *S]`."""
    if isinstance(mask, Mapping):
        mask = next((mask[path] for path in found.paths if path in mask), None)
    if mask is None:
        return None
    mask = mask.to(x.device)
    positions = (x.shape[0], *x.shape[2:])
    if x.dim() == 2 and mask.numel() == x.shape[0]:  # positions that were flattened into samples
        return mask.reshape(-1)
    if mask.shape[0] == x.shape[0] and mask.dim() <= len(positions):
        mask = mask.reshape(*mask.shape, *(1,) * (len(positions) - mask.dim()))
        if all(size in (1, wanted) for size, wanted in zip(mask.shape, positions, strict=True)):
            return mask
    raise ValueError(
        f"recalibrate expects a mask that fits what {found.path!r} is given, {list(positions)} without channels, got "
        f"{list(mask.shape)}. Let mask= return a dict from the path of each layer to its own mask."
    )
