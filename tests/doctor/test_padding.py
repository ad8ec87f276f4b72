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
from batchnorm.doctor.measure.padding import find_padding
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


# What is no padding -----------------------------------------------------------------------------------------------


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


def shifted(generator: torch.Generator) -> Tensor:
    """Photographs shifted about, by the usual random crop after padding on all sides."""
    wide = F.pad(squares(), (6, 6, 6, 6))
    places = torch.randint(13, (len(wide), 2), generator=generator).tolist()
    return torch.stack([image[:, a : a + 32, b : b + 32] for image, (a, b) in zip(wide, places, strict=True)])


def letterboxed(generator: torch.Generator) -> Tensor:
    """Photographs of several heights, in the middle of their frame."""
    heights = torch.randint(12, 31, (48,), generator=generator).tolist()
    above = [(32 - height) // 2 for height in heights]
    return torch.stack([
        F.pad(image[:, :height], (0, 0, top, 32 - height - top))
        for image, height, top in zip(squares(), heights, above, strict=True)
    ])  # fmt: skip


NOT_PADDED: dict[str, Callable[[torch.Generator], Tensor]] = {
    "digits on black": lambda _: digits()[0][:512, :1],
    "digits on white": lambda _: 1 - digits()[0][:512, :1],
    "digits in the corner": lambda _: torch.stack([cornered(digit) for digit in digits()[0][:512, :1]]),
    "a border that all have": lambda _: F.pad(squares(), (1, 5, 1, 5)),
    "a bottom that all have": lambda _: F.pad(squares(), (0, 0, 0, 6)),
    "silhouettes in the corner": shapes,
    "shifted": shifted,
    "letterboxed": letterboxed,
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


# What the doctor makes of it --------------------------------------------------------------------------------------


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
