"""Find padding in the data: positions at the end of sequences and of images that hold one constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.passes import Passes
from batchnorm.models.batches import moved
from batchnorm.models.samples import samples_in
from batchnorm.moments import Moments

# Share of the positions from which padding is reported.
_SHARE = 0.05
# Least share of images that are padded; largest share of these that hold the constant at the top or the left too; least
# share of their edges that are sharp.
_PADDED, _ELSEWHERE, _SHARP = 0.25, 0.1, 0.9
# Number of padded images that is enough, whatever their share.
_ENOUGH = 8


@dataclass(frozen=True)
class PaddingEffect:
    """The effect of padding on the statistics of each layer, in one batch.

    Attributes:
        share: Share of the positions that are padding.
        images: Whether the data are images; otherwise sequences.
        shifts: Difference of the statistics with and without padding, by the layer's path: root mean square of the
            means in σ, or of ln σ where that is larger.
    """

    share: float
    images: bool
    shifts: Mapping[str, float]


def padding_effect(passes: Passes) -> PaddingEffect | None:
    """Measure the input of each layer with and without padding; return None where the data have none."""
    padded = find_padding(passes.kept)
    if padded is None:
        return None
    shifts: dict[str, float] = {}

    def compare(layer: Layer, x: Tensor) -> None:
        mask = padded.mask_for(x)
        if mask is None or not layer.by_batch:
            return
        everything, real = Moments.of(x), Moments.of(x, mask=mask)
        if real.count > 1:
            shift = (everything.mean - real.mean) / (real.var + layer.eps).sqrt()
            scale = ((everything.var + layer.eps) / (real.var + layer.eps)).log() / 2
            shifts[layer.path] = max(float(shift.square().mean().sqrt()), float(scale.square().mean().sqrt()))

    passes.show_inputs(padded.batch, compare)
    return PaddingEffect(padded.share, padded.positions.dim() == 3, shifts)


@dataclass(frozen=True)
class PaddedBatch:
    """A batch with padding.

    Attributes:
        batch: The batch, unchanged.
        positions: The positions that are padding, booleans `[N, L]` or `[N, H, W]`.
    """

    batch: object
    positions: Tensor

    @property
    def share(self) -> float:
        """Share of the positions that are padding."""
        return float(self.positions.double().mean())

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Return which values of a layer's input are not padding, `[N, *S]`; None where x has other positions."""
        size = len(self.positions)
        if len(x) == size and x.dim() == self.positions.dim() + 1:
            stretched = F.interpolate(self.positions[:, None].float(), size=x.shape[2:], mode="nearest")
            return (stretched[:, 0] < 0.5).to(x.device)
        if x.dim() == 2 and len(x) == self.positions.numel():  # positions of sequences, or images as tokens
            return (~self.positions).flatten().to(x.device)
        return None


def find_padding(batches: Iterable[object]) -> PaddedBatch | None:
    """Return a batch with padding: the first one of sequences, or the one of images with most padding."""
    every = list(batches)
    for batch in every:
        for x in _tensors(batch, 3):
            positions = _in_sequences(x)
            if positions is not None:
                return PaddedBatch(batch, positions)
    return _in_images(every)


def _tensors(batch: object, dims: int) -> list[Tensor]:
    """Return the batch's floating-point tensors with this many dimensions and one row per sample."""
    size = samples_in(batch)
    return [
        leaf
        for leaf in pytree.tree_leaves(moved(batch, None))
        if isinstance(leaf, Tensor) and leaf.dim() == dims and len(leaf) == size > 1 and leaf.is_floating_point()
    ]


def _run(same: Tensor) -> Tensor:
    """Return the length of the run of true values at the end of each row of `[N, L]`."""
    return same.flip(1).long().cumprod(1).sum(1)


def _in_sequences(x: Tensor) -> Tensor | None:
    """Return positions `[N, L]`: runs of one constant vector at the end of the samples, of several lengths."""
    for time in (2, 1):  # [N, C, L] for convolutions, [N, L, C] for recurrent networks
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
    """Number of rows and columns at each side of each image that hold one constant vector, `[N]` each."""

    same: Tensor  # [N, H, W]: positions that hold the constant
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
    def positions(self) -> Tensor:
        """The padding at the bottom and the right, `[N, H, W]`."""
        _, height, width = self.same.shape
        below = torch.arange(height) >= (height - self.bottom)[:, None]
        beside = torch.arange(width) >= (width - self.right)[:, None]
        return below[:, :, None] | beside[:, None]

    def sharp(self) -> Tensor:
        """Return for each edge of the padding whether most of the image's last line there has other values."""
        return torch.cat(
            [
                self._sharp_edges(self.same, self.bottom, self.right),
                self._sharp_edges(self.same.mT, self.right, self.bottom),
            ]
        )

    @staticmethod
    def _sharp_edges(same: Tensor, end: Tensor, beside: Tensor) -> Tensor:
        size, length, width = same.shape
        line = same[torch.arange(size), (length - end - 1).clamp_min(0)]
        inside = torch.arange(width) < (width - beside)[:, None]
        share = (line & inside).sum(1) / inside.sum(1).clamp_min(1)
        return (share < 0.5)[end > 0]


def _in_images(batches: list[object]) -> PaddedBatch | None:
    """Find areas at the bottom and the right that hold one constant and whose sizes differ between images.

    A black background is not padding: it is at the top and the left too, and objects in front of it do not end along a
    line. Margins that all images share are not padding either, nor are the borders that shifted images have on every
    side.
    """
    given = [(batch, x) for batch in batches for x in _tensors(batch, 4)[:1] if min(x.shape[2:]) >= 8]
    value = next((found for _, x in given if (found := _filling(x)) is not None), None)
    if value is None:
        return None
    every = [(batch, _Margins.of(x, value)) for batch, x in given if x.shape[1] == len(value)]
    samples = sum(len(margins.same) for _, margins in every)
    some = sum(int(((margins.bottom > 0) | (margins.right > 0)).sum()) for _, margins in every)
    elsewhere = sum(int(((margins.top > 0) | (margins.left > 0)).sum()) for _, margins in every)
    edges = torch.cat([margins.sharp() for _, margins in every])
    if some < max(_PADDED * samples, min(_ENOUGH, samples / 2)) or elsewhere > _ELSEWHERE * some:
        return None
    if float(edges.double().mean()) < _SHARP:
        return None
    uneven = [
        PaddedBatch(batch, margins.positions)
        for batch, margins in every
        if len(torch.stack([margins.bottom, margins.right]).unique(dim=1).T) > 1
    ]
    most = max(uneven, key=lambda found: found.share, default=None)
    return most if most is not None and most.share > _SHARE else None


def _filling(x: Tensor) -> Tensor | None:
    """Return the value `[C]` that fills the last row or column of most images; None where it fills none."""
    corner = x[:, :, -1:, -1:]
    same = (x == corner).all(1)
    filled = corner[same[:, -1].all(1) | same[:, :, -1].all(1)].flatten(1)
    if not len(filled):
        return None
    values, counts = filled.unique(dim=0, return_counts=True)
    return values[counts.argmax()]
