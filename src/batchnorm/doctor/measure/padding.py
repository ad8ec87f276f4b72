"""Which positions of the data are padding: those that hold one constant at the end of sequences and of images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.models.batches import moved, samples_in

# Share of the positions that is worth a look.
_SHARE = 0.05
# Of all images how many are padded, of these how many may have the constant at the top or the left, and how many of
# their edges are sharp, at least.
_PADDED, _ELSEWHERE, _SHARP = 0.25, 0.1, 0.9
# Images that speak for all.
_ENOUGH = 8


@dataclass(frozen=True)
class Padded:
    """A batch with padding.

    Attributes:
        batch: As it was given.
        positions: Those that are padding, booleans `[N, L]` or `[N, H, W]`.
    """

    batch: object
    positions: Tensor

    @property
    def share(self) -> float:
        """Of the positions."""
        return float(self.positions.double().mean())

    def kept(self, x: Tensor) -> Tensor | None:
        """Which values of a layer's input are no padding, `[N, *S]`; None where it has no such positions."""
        size = len(self.positions)
        if len(x) == size and x.dim() == self.positions.dim() + 1:
            stretched = F.interpolate(self.positions[:, None].float(), size=x.shape[2:], mode="nearest")
            return (stretched[:, 0] < 0.5).to(x.device)
        if x.dim() == 2 and len(x) == self.positions.numel():  # of sequences, or of images as tokens
            return (~self.positions).flatten().to(x.device)
        return None


def padded(batches: Iterable[object]) -> Padded | None:
    """A batch with padding, if there is one: the first of sequences, the one with the most of images."""
    every = list(batches)
    for given in every:
        for x in _tensors(given, 3):
            positions = _of_sequences(x)
            if positions is not None:
                return Padded(given, positions)
    return _of_images(every)


def _tensors(batch: object, dims: int) -> list[Tensor]:
    """The batch's floating-point tensors of so many dimensions, one row for each sample."""
    size = samples_in(batch)
    return [
        leaf
        for leaf in pytree.tree_leaves(moved(batch, None))
        if isinstance(leaf, Tensor) and leaf.dim() == dims and len(leaf) == size > 1 and leaf.is_floating_point()
    ]


def _run(same: Tensor) -> Tensor:
    """Of each row `[N, L]` of booleans, how many in a row are true at its end."""
    return same.flip(1).long().cumprod(1).sum(1)


def _of_sequences(x: Tensor) -> Tensor | None:
    """Positions `[N, L]`: a run at the end of one constant vector, the same in all samples, and of several lengths."""
    for time in (2, 1):  # [N, C, L] as convolutions take it, [N, L, C] as recurrent networks do
        values = x.movedim(time, 1)
        if values.shape[1] < 4:
            continue
        run = _run((values == values[:, -1:]).all(2))
        several = run > 1
        ends = values[several, -1]
        if several.any() and bool((ends == ends[:1]).all()) and len(run.unique()) > 1:
            pad = torch.arange(values.shape[1]) >= (values.shape[1] - run * several)[:, None].cpu()
            if float(pad.double().mean()) > _SHARE and not bool(pad.all(1).any()):
                return pad
    return None


# Images ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Margins:
    """Rows and columns of each image of a batch that hold one value in every channel, `[N]` each."""

    same: Tensor  # [N, H, W]: where that value is
    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, x: Tensor, value: Tensor) -> _Margins:
        same = (x == value[:, None, None]).all(1).cpu()
        rows, columns = same.all(2), same.all(1)
        return cls(same, _run(rows.flip(1)), _run(rows), _run(columns.flip(1)), _run(columns))

    @property
    def padded(self) -> Tensor:
        return (self.bottom > 0) | (self.right > 0)

    @property
    def elsewhere(self) -> Tensor:
        return (self.top > 0) | (self.left > 0)

    @property
    def positions(self) -> Tensor:
        """`[N, H, W]`: those at the bottom and the right."""
        _, height, width = self.same.shape
        below = torch.arange(height) >= (height - self.bottom)[:, None]
        beside = torch.arange(width) >= (width - self.right)[:, None]
        return below[:, :, None] | beside[:, None]

    def sharp(self) -> Tensor:
        """Of each edge of the padding, whether the image ends there: most of its last line has other values."""
        return torch.cat(
            [
                self._other(self.same, self.bottom, self.right),
                self._other(self.same.mT, self.right, self.bottom),
            ]
        )

    @staticmethod
    def _other(same: Tensor, end: Tensor, beside: Tensor) -> Tensor:
        size, length, width = same.shape
        line = same[torch.arange(size), (length - end - 1).clamp_min(0)]
        inside = torch.arange(width) < (width - beside)[:, None]
        share = (line & inside).sum(1) / inside.sum(1).clamp_min(1)
        return (share < 0.5)[end > 0]


def _of_images(batches: list[object]) -> Padded | None:
    """Areas at the bottom and the right that hold one constant, as large as differ from image to image.

    A black background is no padding: it is at the top and the left too, and what stands before it does not end along a
    line. Neither are margins that all images have, nor what shifting images about leaves on every side.
    """
    given = [(batch, x) for batch in batches for x in _tensors(batch, 4)[:1] if min(x.shape[2:]) >= 8]
    value = next((found for _, x in given if (found := _filling(x)) is not None), None)
    if value is None:
        return None
    every = [(batch, _Margins.of(x, value)) for batch, x in given if x.shape[1] == len(value)]
    samples = sum(len(margins.same) for _, margins in every)
    some = sum(int(margins.padded.sum()) for _, margins in every)
    elsewhere = sum(int(margins.elsewhere.sum()) for _, margins in every)
    edges = torch.cat([margins.sharp() for _, margins in every])
    if some < max(_PADDED * samples, min(_ENOUGH, samples / 2)) or elsewhere > _ELSEWHERE * some:
        return None
    if float(edges.double().mean()) < _SHARP:
        return None
    uneven = [
        Padded(batch, margins.positions)
        for batch, margins in every
        if len(torch.stack([margins.bottom, margins.right]).unique(dim=1).T) > 1
    ]
    most = max(uneven, key=lambda found: found.share, default=None)
    return most if most is not None and most.share > _SHARE else None


def _filling(x: Tensor) -> Tensor | None:
    """The value `[C]` that most images have in the whole of their last row or column; None where none has one."""
    corner = x[:, :, -1:, -1:]
    same = (x == corner).all(1)
    filled = corner[same[:, -1].all(1) | same[:, :, -1].all(1)].flatten(1)
    if not len(filled):
        return None
    values, counts = filled.unique(dim=0, return_counts=True)
    found: Tensor = values[counts.argmax()]
    return found
