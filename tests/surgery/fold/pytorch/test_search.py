"""Places that the search for ONNX graphs found earlier than the one for PyTorch, and some that neither did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from batchnorm.surgery.fold import fold
from tests.surgery.fold.pytorch.patterns import IMAGE, Sum
from tests.surgery.fold.pytorch.test_fold import assert_folded, trained


class AddedParameter(nn.Module):
    """The parameter has fewer dimensions than the tensor that it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift, self.norm = nn.Conv2d(4, 6, 3), nn.Parameter(torch.randn(6, 1, 1)), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x) + self.shift))


class SharedParameter(AddedParameter):
    """Another call reads the parameter too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.shift


class PartTakenTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.BatchNorm2d(4), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm(torch.relu(x)).chunk(2, dim=1)
        return torch.sin(self.left(parts[0])) + torch.cos(self.right(parts[0])) + self.right(parts[1])


class ConcatenatedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(x))
        return self.conv(torch.cat([y, y], 1))


class ReadTwice(nn.Module):
    """One batch normalization is a term of two sums, and the input of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.sin(self.left(x) + y) * (y - self.right(x)) + torch.cos(self.right(y))


def parallel(*options: dict[str, object]) -> nn.Module:
    branches = [nn.Sequential(nn.Conv2d(4, 6, **each), nn.BatchNorm2d(6)) for each in options]
    return Sum(*branches, last=nn.ReLU())


@pytest.mark.parametrize(
    "make",
    [
        AddedParameter, SharedParameter, PartTakenTwice, ConcatenatedTwice, ReadTwice,
        lambda: parallel({"kernel_size": 3, "padding": "same"}, {"kernel_size": 1}),
        lambda: parallel({"kernel_size": 5, "padding": "same"}, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    ],
)  # fmt: skip
def test_a_pattern_is_folded_exactly(make: Callable[[], nn.Module]) -> None:
    assert_folded(trained(make()), torch.randn(IMAGE))


def test_the_report_names_every_layer_that_holds_a_copy() -> None:
    report = fold(trained(ReadTwice()), torch.randn(IMAGE)).report
    assert [row.now for row in report.changed] == ["in left, right"]


def test_a_sum_takes_a_copy_of_a_batch_normalization_that_stays() -> None:
    class Shared(ReadTwice):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return torch.sin(self.left(x) + y) * torch.relu(y)

    model, x = trained(Shared()), torch.randn(IMAGE)
    folded, report = fold(model, x)
    assert [(row.now, row.reason) for row in report.changed] == [
        ("fused with relu", "its input is also read by an addition; relu reads its result")
    ]
    assert sum(node.target is nn.functional.conv2d for node in folded.graph.nodes) == 1
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_branches_with_padding_by_name_become_one_convolution() -> None:
    model = trained(parallel({"kernel_size": 3, "padding": "same"}, {"kernel_size": 1}))
    folded = assert_folded(model, torch.randn(IMAGE))
    assert sum(node.target is nn.functional.conv2d for node in folded.graph.nodes) == 1
