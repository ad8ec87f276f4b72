"""Every place that batch normalization can move to, against the original in float64, and what it must not move into."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.models import gate
from batchnorm.surgery.fold import count_batch_norms, fold
from tests.surgery.fold.pytorch.patterns import IMAGE, PATTERNS, POOLED


def trained(model: nn.Module, *, positive: bool = False) -> nn.Module:
    """The model with random running statistics and affine parameters, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.2, 2.0, generator=generator)
            with torch.no_grad():
                if layer.weight is not None:
                    layer.weight.uniform_(0.5 if positive else -1.5, 1.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(generator=generator)
    return model.eval()


def assert_equal(folded: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Results agree to float64's rounding where both compute in it, the weights having been rounded to float32."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert gate.relative(folded(x), exact) < 2e-6


def assert_folded(model: nn.Module, x: Tensor, remaining: int = 0, fused: int = 0) -> nn.Module:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folded, report = fold(model, x)
    assert (report.remaining, report.fused) == (remaining, fused), str(report)
    counts = count_batch_norms(folded, x)
    assert (counts.batch_norm, counts.fused) == (remaining, fused)
    assert len(report.changed) + len(report.left) == report.before > 0
    assert_equal(folded, model, x)
    for other in (torch.cat([x, x, x])[: x.shape[0] + 1], x[:1]):
        assert_equal(folded, model, other)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return folded


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_folded_exactly(name: str) -> None:
    make, shape = PATTERNS[name]
    assert_folded(trained(make()), torch.randn(shape))


def test_operations_before_the_next_convolution_are_passed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), *copy.deepcopy(POOLED), nn.Conv2d(6, 3, 3, padding=1))
    assert_folded(trained(model, positive=True), torch.randn(IMAGE))


def test_every_image_size_is_taken() -> None:
    model = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)))
    folded, report = fold(model, torch.randn(1, 3, 16, 16))
    assert report.how == "fx"
    for shape in ((1, 3, 7, 40), (5, 3, 16, 17), (2, 3, 64, 64)):
        assert_equal(folded, model, torch.randn(shape))


class Left:
    """Networks whose batch normalization must stay: how many stay alone, how many with an activation, and why."""

    class StreamOfOthers(nn.Module):
        def __init__(self, last: nn.Module) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), last

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.last(self.norm(x))

    class ChangedInPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.norm(x)
            x[:, 0] = 0.0
            return self.conv(y) + self.conv(x)

    class ComputedWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.conv2d(x, self.weight * x.mean()))


@pytest.mark.parametrize(
    ("model", "remaining", "fused", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), 1, 0,
         "it uses the batch's statistics in evaluation too"),
        (lambda: Left.StreamOfOthers(nn.ReLU()), 0, 1, "its input is also read by an addition; relu reads its result"),
        *((lambda a=a: Left.StreamOfOthers(a), 0, 1, f"by an addition; {name} reads its result") for a, name in (
            (nn.Tanh(), "tanh"), (nn.Sigmoid(), "sigmoid"), (nn.Mish(), "mish"), (nn.Hardsigmoid(), "hardsigmoid"),
            (nn.ELU(0.5), "elu"), (nn.Hardtanh(0, 6), "relu6"),
        )),
        (lambda: Left.StreamOfOthers(nn.SELU()), 1, 0, "by an addition; the layer last (SELU) reads its result"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 3, 3)), 1, 0,
         "avg_pool2d next to it counts padded zeros"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3)), 1, 0,
         "max_pool2d next to it does not commute with a negative scale"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ZeroPad2d(1), nn.Conv2d(4, 3, 3)), 1, 0,
         "it follows relu"),
        (lambda: Left.ChangedInPlace(), 1, 0, "its tensor is changed in place"),
        (lambda: Left.ComputedWeight(), 1, 0, "it follows conv2d"),
        (lambda: nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(5)), 1, 0, "its channels are not the channels"),
    ],
)  # fmt: skip
def test_layers_that_must_stay_have_a_reason(model, remaining: int, fused: int, reason: str) -> None:
    network = trained(model())
    shape = (2, 5, 4) if isinstance(network, nn.Sequential) and isinstance(network[0], nn.Linear) else IMAGE
    x = torch.randn(shape)
    folded, report = fold(network, x)
    assert (report.remaining, report.fused) == (remaining, fused), str(report)
    (row,) = (*report.left, *report.changed)
    assert reason in row.reason
    assert "left" in str(report) or "fused" in str(report)
    assert_equal(folded, network, x)


def test_a_residual_is_fused_too() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.norm(x) + x, 0.2)

    folded = assert_folded(trained(Block()), torch.randn(IMAGE), fused=1)
    assert "add" not in [node.name for node in folded.graph.nodes]


def test_an_addition_is_fused_without_an_activation() -> None:
    class Mixed(nn.Module):
        """ConvMixer's block: batch normalization after the activation, then the shortcut."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(F.gelu(self.conv(x))) + x)

    model, x = trained(Mixed()), torch.randn(IMAGE)
    assert_folded(model, x, fused=1)
    (row,) = fold(model, x).report.changed
    assert (row.now, row.reason) == ("fused with the addition", "it follows gelu; an addition reads its result")


class CalledTwice(nn.Module):
    def __init__(self, shared_norm: bool) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = self.first if shared_norm else nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))


@pytest.mark.parametrize("shared_norm", [False, True])
def test_a_layer_called_twice_gets_weights_for_each_call(shared_norm: bool) -> None:
    model = trained(CalledTwice(shared_norm))
    folded = assert_folded(model, torch.randn(IMAGE))
    assert {"conv.weight", "conv_2.weight"} <= set(folded.state_dict())


def test_a_layer_called_with_and_without_normalization_keeps_its_weights_where_there_is_none() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.norm(self.conv(x))))

    assert_folded(trained(Reused()), torch.randn(IMAGE))


def test_a_parameter_that_another_module_shares_is_folded_for_its_own_call_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight, self.norm = self.one.weight, nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.norm(self.one(x))))

    assert_folded(trained(Tied()), torch.randn(3, 4))


@pytest.mark.parametrize("kind", ["tiny variance", "zero weight", "negative weight", "huge mean"])
def test_ordinary_extremes_are_folded(kind: str) -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6),
                                  nn.Conv2d(6, 3, 3, padding=1)))  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[3]):
            if kind == "tiny variance":
                norm.running_var[:3] = 5.6e-45
            elif kind == "zero weight":
                norm.weight[:3] = 0.0
            elif kind == "negative weight":
                norm.weight.abs_().neg_()
    if kind == "huge mean":
        with torch.no_grad():
            model[1].running_mean.fill_(50.0)
    assert_folded(model, torch.randn(IMAGE))
