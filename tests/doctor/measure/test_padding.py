"""Padding is found, and backgrounds, borders and shifted images do not count as padding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.doctor import Finding, Severity, diagnose
from batchnorm.doctor.pytorch.padding import find_padding
from tests.doctor.networks import Plain, batches, criterion, digits

Images = list[Tensor]


@functools.cache
def photographs(number: int = 48) -> tuple[Tensor, ...]:
    """Crops `[3, H, W]` of two photographs, each with height and width from 32 to 64, normalized."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    generator = torch.Generator().manual_seed(0)
    crops = []
    for n in range(number):
        image = torch.tensor(images[n % 2]).permute(2, 0, 1) / 255
        height, width = torch.randint(32, 65, (2,), generator=generator).tolist()
        top = int(torch.randint(image.shape[1] - height, (), generator=generator))
        left = int(torch.randint(image.shape[2] - width, (), generator=generator))
        crops.append((image[:, top : top + height, left : left + width] - 0.45) / 0.22)
    return tuple(crops)


def collated(images: Images, value: float = 0.0, multiple: int = 1) -> Tensor:
    """Pad images to the largest one at the bottom and the right, like collate functions of detection models."""
    height, width = (-(-max(image.shape[d] for image in images) // multiple) * multiple for d in (1, 2))
    return torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1]), value=value) for i in images])


def split(images: Images, size: int = 8) -> list[Images]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def of_photographs(value: float = 0.0, multiple: int = 1) -> list[Tensor]:
    return [collated(images, value, multiple) for images in split(list(photographs()))]


@pytest.mark.parametrize(("value", "multiple"), [(0.0, 1), (0.0, 32), (-2.05, 1), (114 / 255, 1)])
def test_padded_photographs_are_recognised_to_the_pixel(value: float, multiple: int) -> None:
    data = of_photographs(value, multiple)
    found = find_padding(data)
    assert found is not None
    number = next(n for n, batch in enumerate(data) if batch is found.batch)
    sizes = [image.shape for image in split(list(photographs()))[number]]
    expected = torch.ones(found.positions.shape, dtype=torch.bool)
    for positions, (_, height, width) in zip(expected, sizes, strict=True):
        positions[:height, :width] = False
    assert torch.equal(found.positions, expected)
    assert found.share == float(expected.double().mean()) > 0.2


# Where images are in their padding: the part of the padding before them, along the height and along the width.
PLACES = {
    "top, left": (1.0, 1.0, ("top", "left")),
    "top, right": (1.0, 0.0, ("top", "right")),
    "bottom, left": (0.0, 1.0, ("bottom", "left")),
    "middle": (0.5, 0.5, ("top", "bottom", "left", "right")),
    "middle, right": (0.5, 0.0, ("top", "bottom", "right")),
}


def placed(images: Images, down: float, across: float, value: Tensor, side: int = 64) -> tuple[Tensor, Tensor]:
    """Return images in frames of one size, padded by a vector, and which positions are padding."""
    x, padding = value[:, None, None].expand(len(images), -1, side, side).clone(), torch.ones(len(images), side, side)
    for frame, inside, image in zip(x, padding, images, strict=True):
        _, height, width = image.shape
        top, left = int(down * (side - height)), int(across * (side - width))
        frame[:, top : top + height, left : left + width] = image
        inside[top : top + height, left : left + width] = 0
    return x, padding.bool()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [(0.0, 0.0, 0.0), (0.1, -0.2, 0.3)])
def test_padding_on_any_side_is_recognised_to_the_pixel(place: str, value: tuple[float, ...]) -> None:
    down, across, ends = PLACES[place]
    every = [placed(images, down, across, torch.tensor(value)) for images in split(list(photographs()))]
    found = find_padding([x for x, _ in every])
    assert found is not None and found.ends == ends
    assert torch.equal(found.positions, next(padding for x, padding in every if x is found.batch))


def test_images_of_one_width_are_letterboxed_above_and_below() -> None:
    images = [image[:, : 12 + 2 * (n % 10), :32] for n, image in enumerate(photographs())]
    x, _ = placed(images, 0.5, 0.5, torch.zeros(3), side=32)
    found = find_padding(x.split(8))
    assert found is not None and found.ends == ("top", "bottom")
    assert 0.2 < found.share < 0.5


def test_volumes_may_be_padded() -> None:
    depths = torch.arange(32) % 9
    x = torch.randn(32, 2, 10, 8, 8) * (torch.arange(10) >= depths[:, None])[:, None, :, None, None]
    found = find_padding(x.split(16))
    assert found is not None and found.ends == ("front",)
    assert torch.equal(found.positions.sum((1, 2, 3)), 64 * depths[16:])


def ragged(left: bool, value: Tensor, kind: str = "normal", length: int = 40) -> Tensor:
    """Sequences `[N, C, L]` of several lengths, padded by one vector."""
    generator = torch.Generator().manual_seed(1)
    shape = 32, len(value), length
    x = torch.randn(shape, generator=generator)
    if kind == "one-hot":
        x = F.one_hot(x.argmax(1), shape[1]).mT.float()
    elif kind == "sparse":
        x = F.relu(x - 0.5)
    padded = torch.arange(length) < torch.randint(0, length - 8, (32, 1, 1), generator=generator)
    return torch.where(padded if left else padded.flip(2), value[:, None], x)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["normal", "one-hot", "sparse"])
@pytest.mark.parametrize("value", [0.0, -11.5])
def test_sequences_are_padded_at_either_end(left: bool, last: bool, kind: str, value: float) -> None:
    x = ragged(left, torch.full((6,), value), kind)
    found = find_padding((x.mT if last else x).split(8))
    assert found is not None and found.ends == ("beginning" if left else "end",)
    part = next(part for part in x.split(8) if torch.equal(part, found.batch.mT if last else found.batch))
    edge = part.flip(2) if left else part
    expected = (edge == value).all(1).flip(1).long().cumprod(1).flip(1)
    expected *= expected.sum(1, keepdim=True) > 1  # a single position says nothing
    assert torch.equal(found.positions, (expected.flip(1) if left else expected).bool())


def test_only_one_side_may_be_padded() -> None:
    wide = [collated([image[:, :32] for image in images]) for images in split(list(photographs()))]
    found = find_padding(wide)
    assert found is not None and not found.positions[:, :, 0].any()


def test_batches_of_two_may_be_padded() -> None:
    found = find_padding([collated(images) for images in split(list(photographs()), 2)])
    assert found is not None and len(found.positions) == 2


def test_a_batch_of_a_detector_may_be_a_dict() -> None:
    data = [{"pixel_values": x, "pixel_mask": (x != 0).any(1)} for x in of_photographs()]
    assert find_padding(data) is not None


# Data without padding ---------------------------------------------------------------------------------------------


def cornered(digit: Tensor) -> Tensor:
    """A digit moved into the upper left corner of its picture."""
    rows, columns = (digit.amax(0).gt(0.1).any(d).long().argmax() for d in (1, 0))
    return digit.roll((-int(rows), -int(columns)), (1, 2))


def shapes(generator: torch.Generator) -> Tensor:
    """Silhouettes that stand in the upper left corner, on black."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    radii = torch.randint(8, 28, (32, 2, 1, 1), generator=generator).float()
    inside = ((y / radii[:, :1]) ** 2 + (x / radii[:, 1:]) ** 2 < 1).reshape(32, 1, 32, 32)
    return inside * torch.rand(32, 3, 32, 32, generator=generator)


def squares() -> Tensor:
    """The photographs, all of one size."""
    return torch.stack([image[:, :32, :32] for image in photographs()])


def shifted(generator: torch.Generator, side: int, by: int) -> Tensor:
    """Photographs shifted about, by the usual random crop after padding on all sides."""
    wide = F.pad(squares()[:, :, :side, :side], (by,) * 4)
    places = torch.randint(2 * by + 1, (len(wide), 2), generator=generator).tolist()
    return torch.stack([image[:, a : a + side, b : b + side] for image, (a, b) in zip(wide, places, strict=True)])


def silhouettes(generator: torch.Generator) -> Tensor:
    """Ellipses of several sizes in the middle of a white frame, like pictures of products."""
    y, x = torch.meshgrid(torch.arange(-16.0, 16), torch.arange(-16.0, 16), indexing="ij")
    radii = torch.randint(8, 15, (32, 2, 1, 1), generator=generator).float()
    inside = ((y / radii[:, :1]) ** 2 + (x / radii[:, 1:]) ** 2 < 1).reshape(32, 1, 32, 32)
    return torch.where(inside, torch.rand(32, 3, 32, 32, generator=generator), 1.0)


def spectrograms(generator: torch.Generator) -> Tensor:
    """Logarithmic spectra `[N, 1, F, T]` with a floor, above which high frequencies are seldom."""
    fall = torch.linspace(2, -8, 40) * (0.5 + torch.rand(32, 1, generator=generator))
    return (fall[:, None, :, None] + torch.randn(32, 1, 40, 50, generator=generator)).clamp_min(-3)


NOT_PADDED: dict[str, Callable[[torch.Generator], Tensor]] = {
    "digits on black": lambda _: digits()[0][:512, :1],
    "digits on white": lambda _: 1 - digits()[0][:512, :1],
    "digits in the corner": lambda _: torch.stack([cornered(digit) for digit in digits()[0][:512, :1]]),
    "a border that all have": lambda _: F.pad(squares(), (1, 5, 1, 5)),
    "a bottom that all have": lambda _: F.pad(squares(), (0, 0, 0, 6)),
    "silhouettes in the corner": shapes,
    "shifted": lambda generator: shifted(generator, 32, 6),
    "shifted by one pixel": lambda generator: shifted(generator, 9, 1),
    "silhouettes": silhouettes,
    "spectrograms": spectrograms,
    "sparse maps": lambda generator: F.relu(torch.randn(32, 2, 12, 12, generator=generator) - 1),
    "photographs": lambda _: squares(),
    "noise": lambda generator: torch.randn(32, 3, 32, 32, generator=generator),
    "one colour each": lambda generator: torch.rand(32, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16),
    "black": lambda _: torch.zeros(32, 3, 16, 16),
}


@pytest.mark.parametrize("name", NOT_PADDED)
@pytest.mark.parametrize("size", [4, 32])
def test_backgrounds_borders_and_shifts_are_no_padding(name: str, size: int) -> None:
    images = NOT_PADDED[name](torch.Generator().manual_seed(0))
    assert find_padding(images.split(size)) is None


def silent(generator: torch.Generator) -> Tensor:
    """Sounds `[N, C, L]` that begin and end in silence."""
    place = torch.arange(40)
    begin, end = (torch.randint(2, 10, (32, 1, 1), generator=generator) for _ in range(2))
    return torch.randn(32, 5, 40, generator=generator) * ((place >= begin) & (place < 40 - end))


def paused(generator: torch.Generator) -> Tensor:
    """Sounds `[N, C, L]` with a pause, most of which begin with a shorter one."""
    place = torch.arange(40)
    begin, pause = (torch.randint(*range_, (32, 1, 1), generator=generator) for range_ in ((0, 7), (10, 20)))
    sounding = (place >= begin) & ((place < pause) | (place >= pause + 12))
    return torch.randn(32, 5, 40, generator=generator) * sounding


SEQUENCES_NOT_PADDED: dict[str, Callable[[torch.Generator], Tensor]] = {
    "one-hot": lambda generator: F.one_hot(torch.randint(4, (32, 20), generator=generator), 4).mT.float(),
    "short one-hot": lambda generator: F.one_hot(torch.randint(2, (32, 8), generator=generator), 2).mT.float(),
    "sparse": lambda generator: F.relu(torch.randn(32, 3, 20, generator=generator) - 1),
    "rows of digits": lambda _: digits()[0][:512, 0].mT,
    "silent at both ends": silent,
    "with pauses": paused,
    "a beginning that all share": lambda generator: F.pad(torch.randn(32, 3, 20, generator=generator), (6, 0)),
    "constant": lambda _: torch.zeros(32, 3, 20),
    "noise": lambda generator: torch.randn(32, 3, 20, generator=generator),
}


@pytest.mark.parametrize("name", SEQUENCES_NOT_PADDED)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [4, 32])
def test_runs_in_sequences_are_no_padding(name: str, last: bool, size: int) -> None:
    x = SEQUENCES_NOT_PADDED[name](torch.Generator().manual_seed(0))
    assert find_padding((x.mT if last else x).split(size)) is None


# The doctor's findings --------------------------------------------------------------------------------------------


def found_in(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Finding]:
    model.train()
    for x, _ in data:
        model(x)
    return [finding for finding in diagnose(model, data, loss=criterion).findings if finding.code == "BN113"]


def with_labels(images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.arange(len(x)) % 10) for x in images]


def test_padded_images_are_found_and_those_of_one_size_are_not() -> None:
    torch.manual_seed(0)
    model = Plain()
    (finding,) = found_in(model, with_labels(of_photographs(-2.05)))
    assert finding.severity == Severity.WARNING
    assert finding.paths == tuple(f"blocks.{number}.1" for number in range(6))
    assert "bottom and the right of the images" in finding.evidence[0]
    assert 0.3 < finding.cost["padding"] < 0.6
    assert not found_in(model, with_labels(list(squares().split(8))))
    assert not found_in(model, batches())


@pytest.mark.parametrize("left", [False, True])
def test_sequences_padded_at_either_end_are_found(left: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8))
    data = ragged(left, torch.full((6,), -4.0)).split(8)
    for x in data:
        model(x)
    (finding,) = [finding for finding in diagnose(model, list(data)).findings if finding.code == "BN113"]
    assert finding.severity == Severity.WARNING and finding.paths == ("0", "2")
    assert f"positions at the {'beginning' if left else 'end'} of the sequences" in finding.evidence[0]


class Masked(nn.Sequential):
    """Blocks whose layers are called with a mask, as the fix says."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x != 0).any(1, keepdim=True)
        for convolution, norm, activation in self:
            x = convolution(x)
            mask = F.interpolate(mask.float(), size=x.shape[2:]) > 0.5
            x = activation(norm(x, mask=mask[:, 0]))
        return x


def test_with_masks_as_the_repair_says_nothing_is_found() -> None:
    torch.manual_seed(0)
    data = with_labels(of_photographs())
    model, _ = batchnorm.convert(Plain(), batchnorm.nn)
    assert found_in(model, data)
    model.blocks.__class__ = Masked
    assert not found_in(model, data)
