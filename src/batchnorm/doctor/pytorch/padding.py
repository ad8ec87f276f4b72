"""Find padding in the data: the outer positions of sequences, images and volumes that hold one constant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.models.data.batches import as_tensors
from batchnorm.models.data.samples import samples_in
from batchnorm.moments import Moments

# Padding is reported from this share of the positions.
_SHARE = 0.05
# Smallest share of padded images, and of sharp edges among their edges.
_PADDED, _SHARP = 0.25, 0.9
# Smallest number of padded samples; half of all samples if there are fewer than twice as many.
_ENOUGH = 8
# Largest share of the padded samples that are not padded at the same ends as the rest.
_ELSEWHERE = 0.1
# The ends of each axis, by the number of axes.
_ENDS = {
    1: (("beginning", "end"),),
    2: (("top", "bottom"), ("left", "right")),
    3: (("front", "back"), ("top", "bottom"), ("left", "right")),
}


@dataclass(frozen=True)
class PaddedBatch:
    """A batch with padding.

    Attributes:
        batch: The batch, unchanged.
        positions: The positions that are padding, booleans `[N, *S]`.
        ends: Where the padding is, as in `PaddingEffect`.
    """

    batch: object
    positions: Tensor
    ends: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the positions that are padding."""
        return float(self.positions.double().mean())

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Return which values of a layer's input are not padding, `[N, *S]`; None if x has other positions."""
        size = len(self.positions)
        if len(x) == size and x.dim() == self.positions.dim() + 1:
            stretched = F.interpolate(self.positions[:, None].float(), size=x.shape[2:], mode="nearest")
            return (stretched[:, 0] < 0.5).to(x.device)
        if x.dim() == 2 and len(x) == self.positions.numel():  # positions of sequences, or images as tokens
            return (~self.positions).flatten().to(x.device)
        return None

    def shift(self, x: Tensor, eps: float) -> float | None:
        """Return the difference of a layer's batch statistics with and without padding; None if it is unknown.

        It is the root mean square difference of the means in σ, or of ln σ if that is larger.
        """
        mask = self.mask_for(x)
        if mask is None:
            return None
        everything, real = Moments.of(x), Moments.of(x, mask=mask)
        if not real.count > 1:
            return None
        shift = (everything.mean - real.mean) / (real.var + eps).sqrt()
        scale = ((everything.var + eps) / (real.var + eps)).log() / 2
        return max(float(shift.square().mean().sqrt()), float(scale.square().mean().sqrt()))


def find_padding(batches: Iterable[object]) -> PaddedBatch | None:
    """Return the batch with the most padding; None if the data are not padded.

    Padding holds one constant vector, at the same ends of all samples, and its size differs between samples. Other
    margins are not padding: a margin that is the same in all samples; a background, which has uneven parts on both
    sides and no straight edges; the borders of images at random places.
    """
    every = list(batches)
    for axes in _ENDS:
        for given in zip_longest(*(_tensors(batch, axes + 2) for batch in every)):
            for channels in (1, 2) if axes == 1 else (1,):  # [N, C, L] for convolutions, [N, L, C] for recurrent layers
                pairs = zip(every, given, strict=True)
                found = _padded([(batch, x.movedim(channels, 1)) for batch, x in pairs if x is not None])
                if found is not None:
                    return found
    return None


def _tensors(batch: object, dims: int) -> list[Tensor]:
    """Return the batch's floating-point tensors with this many dimensions and one row per sample."""
    size = samples_in(batch)
    return [
        leaf
        for leaf in pytree.tree_leaves(as_tensors(batch))
        if isinstance(leaf, Tensor) and leaf.dim() == dims and len(leaf) == size > 1 and leaf.is_floating_point()
    ]


def _padded(given: list[tuple[object, Tensor]]) -> PaddedBatch | None:
    """Return the batch with the most padding; each batch comes with one of its tensors, `[N, C, *S]`."""
    given = [(batch, x) for batch, x in given if min(x.shape[2:]) >= (4 if x.dim() == 3 else 8)]
    value = _filling([x for _, x in given])
    if value is None:
        return None
    every = [(batch, _Margins.of(x, value)) for batch, x in given if x.shape[1] == len(value)]
    ends = _ends(torch.cat([margins.sizes for _, margins in every]))
    if ends is None:
        return None
    every = [(batch, replace(margins, sizes=margins.sizes * ends)) for batch, margins in every]
    sizes, inner, sharp = (
        torch.cat(parts).double() for parts in zip(*((m.sizes, m.inner(), m.sharp()) for _, m in every), strict=True)
    )
    if sharp.mean() < _SHARP or sizes.sum() <= inner[sizes.sum(2) > 0].sum():
        return None
    names = [name for name, there in zip(sum(_ENDS[len(ends)], ()), ends.flatten(), strict=True) if there]
    uneven = [
        PaddedBatch(batch, margins.positions(), tuple(names))
        for batch, margins in every
        if len(margins.sizes.unique(dim=0)) > 1
    ]
    most = max(uneven, key=lambda found: found.share, default=None)
    return most if most is not None and most.share > _SHARE else None


def _filling(every: list[Tensor]) -> Tensor | None:
    """Return the value `[C]` that fills the outermost lines of most samples; None if none does."""
    found = []
    for x in every:
        for end in (0, -1):
            corner = x.flatten(2)[:, :, end]
            filled = (_sizes(_same(x, corner))[:, :, end] > 0).any(1)
            found.append(corner[filled])
    found = [values for values in found if values.shape[1] == found[0].shape[1]]
    if not any(map(len, found)):
        return None
    values, counts = torch.cat(found).unique(dim=0, return_counts=True)
    return values[counts.argmax()]


def _ends(sizes: Tensor) -> Tensor | None:
    """Return which ends of each axis are padded, `[axes, 2]`; None if too few samples are padded, or at other ends.

    Both ends of an axis may be padded if the image is in the middle.
    """
    samples, axes, _ = sizes.shape
    some = int((sizes.sum((1, 2)) > 0).sum())
    if some < min(_ENOUGH, samples / 2) or (axes > 1 and some < _PADDED * samples):
        return None
    ends = []
    for first, last in sizes.permute(1, 2, 0):
        anywhere, middle = first + last > 0, ((first - last).abs() <= 1) & (first + last > 1)
        otherwise = {(0, 0): anywhere, (0, 1): first > 0, (1, 0): last > 0}
        if axes > 1:
            otherwise[1, 1] = anywhere & ~middle
        alike = [there for there, other in otherwise.items() if int(other.sum()) <= _ELSEWHERE * some]
        if not alike:
            return None
        ends.append(alike[0])
    return torch.tensor(ends, device="cpu")


def _same(x: Tensor, values: Tensor) -> Tensor:
    """Return which positions of `x` hold these values, `[N, C]` or `[1, C]`."""
    return (x == values.reshape(*values.shape, *(1 for _ in x.shape[2:]))).all(1)


def _lines(same: Tensor) -> list[Tensor]:
    """Return for each axis of `[N, *S]` which lines are all true, `[N, L]`; a line has one index along the axis."""
    return [same.movedim(axis, 1).reshape(len(same), same.shape[axis], -1).all(2) for axis in range(1, same.dim())]


def _sizes(same: Tensor) -> Tensor:
    """Return the number of lines that are all true at both ends of each axis, `[N, axes, 2]`.

    A sample that is all true has none. A single position of a sequence does not count.
    """
    ends = [[lines.long().cumprod(1).sum(1), lines.flip(1).long().cumprod(1).sum(1)] for lines in _lines(same)]
    sizes = torch.stack([torch.stack(pair, 1) for pair in ends], 1)
    sizes[same.flatten(1).all(1)] = 0
    return sizes * (sizes > 1) if len(ends) == 1 else sizes


@dataclass(frozen=True)
class _Margins:
    """The lines at both ends of each axis that hold one constant.

    Attributes:
        same: The positions that hold the constant, booleans `[N, *S]`.
        sizes: The number of lines, `[N, axes, 2]`.
    """

    same: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, x: Tensor, value: Tensor) -> _Margins:
        same = _same(x, value[None])
        return cls(same.cpu(), _sizes(same).cpu())

    def outside(self) -> list[Tensor]:
        """Return for each axis the lines that are padding, `[N, L]`."""
        lengths = [torch.arange(length, device="cpu") for length in self.same.shape[1:]]
        pairs = zip(lengths, self.sizes.unbind(1), strict=True)
        return [(index < size[:, :1]) | (index >= len(index) - size[:, 1:]) for index, size in pairs]

    def positions(self) -> Tensor:
        """Return the positions that are padding, `[N, *S]`."""
        found = torch.zeros_like(self.same)
        for axis, lines in enumerate(self.outside(), start=1):
            found |= lines.reshape(len(lines), *(-1 if axis == other else 1 for other in range(1, found.dim())))
        return found

    def inner(self) -> Tensor:
        """Return for each axis the longest run of lines that hold the constant and are not padding, `[N, axes]`."""
        runs = []
        for lines, outside in zip(_lines(self.same), self.outside(), strict=True):
            index = torch.arange(lines.shape[1], device="cpu")
            before = torch.where(lines & ~outside, -1, index).cummax(1).values
            runs.append((index - before).amax(1))
        return torch.stack(runs, 1)

    def sharp(self) -> Tensor:
        """Return for each edge of the padding whether most of the sample's adjacent line has other values."""
        size, found = len(self.same), []
        inside = ~self.positions()
        for axis, ends in enumerate(self.sizes.unbind(1), start=1):
            last = self.same.shape[axis] - 1
            for lines, line in ((ends[:, 0], ends[:, 0]), (ends[:, 1], last - ends[:, 1])):
                there, same = (
                    values.movedim(axis, 1)[torch.arange(size, device="cpu"), line] for values in (inside, self.same)
                )
                share = (same & there).reshape(size, -1).sum(1) / there.reshape(size, -1).sum(1)
                found.append((share < 0.5)[lines > 0])
        return torch.cat(found)
