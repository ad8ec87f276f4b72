"""The two operators of whitening: products of deviations, and linear maps of them.

x is `[N, C, *S]`. A group is `size` consecutive channels; the last group may be smaller. The groups' matrices are
packed as `[C, min(size, C)]`. Without `mean [C]`, x are deviations.

| name              | result                                                                                      |
|-------------------|---------------------------------------------------------------------------------------------|
| `whiten_products` | packed `Σ left·(x - mean)ᵀ` and `Σ left [C]`, where left is dy, or `weights·(x - mean)`     |
| `whiten_map`      | `weights·(matrices·(x - mean) + shift) + dy_matrices·dy`                                    |

Their derivatives are those of `whitening_function`. The sums have the widest dtype; the map's result has x's dtype and
strides. On the CPU, both operators are compiled. Elsewhere, they are batched products by torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.ops import compiled, eager, whitening
from batchnorm.ops.reduce import sum_pairwise, sum_positions

# The values that several steps compute at once: 2 MB in float32.
_BLOCK = 1 << 19


_COMPILED = bool(compiled.cpu_capabilities())


def are_compiled(x: Tensor) -> bool:
    """Return whether compiled operators, which compute deviations on the way, handle x."""
    return _COMPILED and x.device.type == "cpu"


class Planes:
    """The view `[P, C, K]` of x, and of other tensors of its shape."""

    def __init__(self, x: Tensor, size: int) -> None:
        n, self.channels = x.shape[:2]
        positions = x[0, 0].numel()
        self.size = min(size, self.channels)
        # In the other view, a smaller last group is between the samples, or products are larger than their factors.
        innermost = x.movedim(1, -1).is_contiguous() or self.channels % self.size != 0 or positions < self.size
        self.channels_innermost = innermost
        self.count, self.length = (1, n * positions) if innermost else (n, positions)

    def of(self, t: Tensor) -> Tensor:
        """Return `t [N, *, *S]` as `[P, *, K]`: a view, or a copy if its memory layout differs."""
        if self.channels_innermost:
            return t.movedim(1, -1).reshape(1, self.length, -1).mT
        return t.reshape(self.count, -1, self.length).contiguous()

    def empty_like(self, planes: Tensor) -> Tensor:
        """Return a new tensor `[P, C, K]` with groups that are views."""
        if self.channels_innermost:
            return torch.empty_like(planes.mT, memory_format=torch.contiguous_format).mT
        return torch.empty_like(planes)

    def of_weights(self, weights: Tensor | None) -> Tensor | None:
        """Return `weights [N, *S]` as `[P, 1, K]`."""
        return None if weights is None else self.of(weights.unsqueeze(1))

    def restored(self, planes: Tensor, x: Tensor) -> Tensor:
        """Return `planes [P, C, K]` in x's shape."""
        if self.channels_innermost:
            return planes.mT.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
        return planes.reshape(x.shape)

    def groups(self, planes: Tensor) -> list[Tensor]:
        """View `[P, C, *]` as `[P·groups, d, *]`, and a smaller last group as `[1, d, *]`."""
        whole = self.channels // self.size * self.size
        parts = [planes[:, :whole].view(-1, self.size, planes.shape[2])]
        return parts if whole == self.channels else [*parts, planes[:, whole:]]

    def products(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """Return `Σ left·rightᵀ` of each group over planes and positions, `[groups, d, d]`."""
        pairs = zip(self.groups(left), self.groups(right), strict=True)
        return [sum_pairwise(whitening.summed_product(*pair).unflatten(0, (self.count, -1)), 0) for pair in pairs]

    def blocks(self) -> list[slice]:
        """Return the planes in blocks of a few, which stay in the cache from one step of a computation to the next."""
        planes = max(_BLOCK // max(self.channels * self.length, 1), 1)
        return [slice(first, first + planes) for first in range(0, self.count, planes)]

    def add_products(self, onto: Tensor, matrices: Sequence[Tensor], values: Tensor) -> None:
        """Add each group's `matrix·values` to `onto`, in place; both may be a block of planes."""
        for total, matrix, group in zip(self.groups(onto), matrices, self.groups(values), strict=True):
            repeated = matrix.expand(group.shape[0] // matrix.shape[0], *matrix.shape).flatten(0, 1)
            if self.channels_innermost:
                total.mT.baddbmm_(group.mT, repeated.mT)
            else:
                total.baddbmm_(repeated, group)


def _deviations(planes: Planes, x: Tensor, mean: Tensor | None) -> Tensor:
    values = planes.of(x).to(eager.statistics_dtype(x))
    return values if mean is None else values - mean.unsqueeze(1)


def whiten_products(
    x: Tensor, mean: Tensor | None, dy: Tensor | None, weights: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Compute the operator by torch."""
    if x.numel() == 0:
        products, sums = _fake_products(x, mean, dy, weights, size)
        return products.zero_(), sums.zero_()
    planes = Planes(x, size)
    values, w = _deviations(planes, x, mean), planes.of_weights(weights)
    left = values if w is None else values * w
    if dy is not None:
        left = planes.of(dy).to(values.dtype)
    packed, sums = whitening.pack_matrices(planes.products(left, values)), sum_pairwise(sum_positions(left), 0)
    wide = eager.wide_dtype(x)
    return packed.to(wide), sums.to(wide)


def whiten_map(
    x: Tensor,
    mean: Tensor | None,
    matrices: Tensor,
    shift: Tensor,
    dy: Tensor | None,
    dy_matrices: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Compute the operator by torch."""
    if x.numel() == 0:
        return torch.empty_like(x)
    planes = Planes(x, matrices.shape[1])
    values, w = _deviations(planes, x, mean), planes.of_weights(weights)
    upstream = None if dy is None else planes.of(dy).to(values.dtype)
    y = planes.empty_like(values)
    for block in planes.blocks():
        planes.add_products(y[block].copy_(shift.reshape(-1, 1)), _unpacked(matrices), values[block])
        if w is not None:
            y[block] *= w[block]
        if upstream is not None:
            assert dy_matrices is not None
            planes.add_products(y[block], _unpacked(dy_matrices), upstream[block])
    found, like = planes.restored(y, x), torch.empty_like(x)
    return found if (found.dtype, found.stride()) == (like.dtype, like.stride()) else like.copy_(found)


def _unpacked(matrices: Tensor) -> list[Tensor]:
    return whitening.unpack_matrices(matrices, matrices.shape[1])


def _fake_products(
    x: Tensor, mean: Tensor | None, dy: Tensor | None, weights: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    channels, wide = x.shape[1], eager.wide_dtype(x)
    return x.new_empty((channels, min(size, channels)), dtype=wide), x.new_empty(channels, dtype=wide)


_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")
_LIBRARY.define(
    "whiten_products(Tensor x, Tensor? mean, Tensor? dy, Tensor? weights, int size) -> (Tensor products, Tensor sums)"
)
_LIBRARY.define(
    "whiten_map(Tensor x, Tensor? mean, Tensor matrices, Tensor shift, Tensor? dy, Tensor? dy_matrices, "
    "Tensor? weights) -> Tensor y"
)
_LIBRARY.impl("whiten_products", whiten_products, "CompositeExplicitAutograd")
_LIBRARY.impl("whiten_map", whiten_map, "CompositeExplicitAutograd")
torch.library.register_fake("batchnorm::whiten_products", _fake_products, lib=_LIBRARY)
torch.library.register_fake("batchnorm::whiten_map", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)
