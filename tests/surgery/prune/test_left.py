"""Channels that cannot be removed stay, with the reason; wrong arguments and failures change nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.models.gate import TOLERANCE, relative
from batchnorm.surgery.prune import PruneError, PruneReport, prune_channels
from tests.surgery.prune.models import error, made, slimmed, state

# Channels that stay ---------------------------------------------------------------------------------------------------


def chain(norm: nn.Module, *after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), *after)


class Called(nn.Module):
    """A convolution, batch normalization and a function of the two layers after it."""

    def __init__(self, function: Callable[..., Tensor], last: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), function
        self.last = nn.Conv2d(8, 4, 3) if last is None else last
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.norm(self.conv(x)).relu())


def tied() -> nn.Module:
    model = chain(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model[5].weight = model[3].weight
    return model


def hooked() -> nn.Module:
    model = chain(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    model[1].register_forward_hook(lambda *_: None)
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "output": (lambda: chain(nn.BatchNorm2d(8)), "channels of the network's output"),
    "grouped": (lambda: chain(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, groups=2)), "a grouped convolution"),
    "shuffled": (lambda: chain(nn.BatchNorm2d(8), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)), "PixelShuffle"),
    "group norm": (lambda: chain(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), "GroupNorm"),
    "tied": (tied, "used in several places"),
    "hooked": (hooked, "it has hooks"),
    "shared": (lambda: Called(lambda m, x: m.norm(x), nn.Identity()), "used in several places"),
    "weight norm": (
        lambda: chain(nn.BatchNorm2d(8), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1))), "Parametrized",
    ),
    "written size": (lambda: Called(lambda m, x: m.last(x.reshape(-1, 8 * 25)), nn.Linear(200, 4)), "a reshape"),
    "split": (lambda: Called(lambda m, x: operator.add(*x.chunk(2, 1))), "split into parts"),
    "a parameter": (lambda: Called(lambda m, x: m.last(x * m.scale)), "a constant has a value"),
    "computed weight": (lambda: Called(lambda m, x: F.conv2d(x, m.last.weight * 2)), "channels of conv2d"),
    "counted pool": (lambda: chain(nn.BatchNorm2d(8), nn.Sigmoid(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)), "vary"),
    "zero padding": (
        lambda: chain(nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1)), "not zero, and conv2d in 4 pads",
    ),
    "another module's bias": (
        lambda: Called(
            lambda m, x: F.conv2d(x, m.last[0].weight, m.last[1].bias),
            nn.Sequential(nn.Conv2d(8, 4, 3), nn.Linear(1, 4)),
        ),
        "in several modules",
    ),
    "an embedding's weight": (
        lambda: Called(lambda m, x: F.linear(x.mean((2, 3)), m.last.weight), nn.Embedding(4, 8)), "not only the weight",
    ),
    "statistics of the batch": (
        lambda: Called(lambda m, x: m.last(F.batch_norm(x, None, None, training=True))), "channels of batch_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_channels_stay_with_the_reason(name: str) -> None:
    torch.manual_seed(0)
    make, reason = LEFT[name]
    model = slimmed(make().double())
    x = torch.randn(2, 3, 7, 7).double()
    pruned, report = prune_channels(model, x)
    assert not report.changed and report.difference == 0.0
    (left,) = report.left
    assert reason in left.reason, left.reason
    assert error(model, pruned, x) == 0.0


def test_a_model_that_cannot_be_traced_is_left() -> None:
    class Looping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            while float(x.abs().max()) > 1:
                x = x / 2
            return super().forward(x)

    model = slimmed(Looping(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)))
    pruned, report = prune_channels(model, torch.randn(2, 3, 7, 7))
    assert "cannot be traced" in report.left[0].reason and pruned[1].num_features == 8


JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "frames of clips": lambda y: y.view(-1, 4, *y.shape[1:]).mean(1),
    "triplets": lambda y: operator.sub(*y[: y.shape[0] // 3 * 3].view(-1, 3, *y.shape[1:]).unbind(1)[:2]),
    "one sample by its number": lambda y: y[5],
    "time first": lambda y: y.reshape(4, -1, *y.shape[1:]).transpose(0, 1),
}


@pytest.mark.parametrize("name", JOINED)
def test_networks_that_join_the_first_axis_are_pruned(name: str) -> None:
    class Joined(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return JOINED[name](super().forward(x))

    model, x = (
        slimmed(Joined(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))).eval(),
        torch.randn(12, 3, 7, 7),
    )
    pruned, report = prune_channels(model, x)
    assert pruned[1].num_features < 8 and not report.left, str(report)
    assert relative(pruned(x), model(x)) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    "kind", ["BatchNorm2d", "BatchNormAct2d", "BatchRenorm2d", "FrozenBatchNorm2d", "GhostBatchNorm"]
)
def test_layers_of_this_library_are_pruned(kind: str) -> None:
    options = {"ghost_size": 2} if kind == "GhostBatchNorm" else {}
    model = slimmed(chain(getattr(batchnorm.nn, kind)(8, **options), nn.Conv2d(8, 4, 3)).double())
    pruned, report = prune_channels(model, x := torch.randn(4, 3, 7, 7).double())
    assert report.changed and error(model, pruned, x) < TOLERANCE["float64"]
    pruned.train()(x).sum().backward()


def test_an_accelerated_model_is_pruned() -> None:
    model, x = made("resnet")
    accelerated, report = batchnorm.accelerate(model, x)
    assert report.changed
    pruned, report = prune_channels(accelerated, x)
    assert len(report.changed) == 3 and error(model, pruned, x) < TOLERANCE["float64"]


# Failures, and the model itself ---------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """Calls one more layer in training and for larger images, which the trace of the example does not show."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.more = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        more = self.training if self.size is None else x.shape[-1] > self.size
        return self.head(x) + self.more(x) if more else self.head(x)


@pytest.mark.parametrize("size", [None, 5])
def test_layers_called_only_in_training_or_for_larger_images_are_noticed(size: int | None) -> None:
    model = slimmed(Auxiliary(size))
    with pytest.raises(PruneError, match=r"expects a model that runs with fewer channels.*only="):
        prune_channels(model, torch.randn(2, 3, 7, 7), inplace=True)
    assert model.norm.num_features == len(model.norm.weight) == 8


def test_inplace_keeps_modules_hooks_and_modes() -> None:
    model, x = made("resnet")
    expected, _ = prune_channels(model, x)
    model.register_forward_hook(hook := lambda *_: None)
    model.layer1.eval()
    kept = dict(model.named_modules())
    modes = {path: module.training for path, module in model.named_modules()}
    same, report = prune_channels(model, x, inplace=True)
    assert same is model and dict(model.named_modules()) == kept
    assert {path: m.training for path, m in model.named_modules()} == modes
    assert list(model._forward_hooks.values()) == [hook]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert any("create the optimizer after" in note for note in report.notes)


def test_an_interruption_leaves_the_model_unchanged() -> None:
    model, x = made("resnet")
    held = [*model.parameters(), *model.buffers()]
    before = state(model)
    last = model.layer2[1].conv2

    class Interrupted(dict):  # type: ignore[type-arg]
        def __setitem__(self, name: str, value: Any) -> None:
            if self is last._parameters:
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    last._parameters = Interrupted(last._parameters)
    with pytest.raises(KeyboardInterrupt):
        prune_channels(model, x, inplace=True)
    assert all(a is b for a, b in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    assert state(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.5, "threshold": 0.1}, "share or threshold"),
        ({"share": 0.0}, "share above 0 and below 1"),
        ({"share": 1.0}, "share above 0 and below 1"),
        ({"threshold": -1.0}, "threshold >= 0"),
        ({"threshold": float("nan")}, "threshold >= 0"),
        ({"only": "nothing.*"}, "matches none"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model, x = made("vgg")
    with pytest.raises(ValueError, match=f"prune_channels expects .*{message}"):
        prune_channels(model, x, **options)


def test_wrong_models_and_examples_are_refused() -> None:
    with pytest.raises(TypeError, match="prune_channels expects a torch.nn.Module"):
        prune_channels(torch.relu, torch.ones(1))  # type: ignore[arg-type]
    model, x = made("vgg")
    with pytest.raises(ValueError, match="prune_channels expects example_inputs that the model takes"):
        prune_channels(model, x[:, :2])
    with pytest.raises(ValueError, match="prune_channels expects a model with values, got '0.weight' on the meta"):
        prune_channels(model.to("meta"), x)


def test_the_report_prints_sizes_and_times() -> None:
    model, x = made("resnet")
    report = batchnorm.prune_channels(model, x).report
    assert isinstance(report, PruneReport) and report.bytes < report.bytes_before
    assert report.seconds > 0 and report.seconds_before > 0
    text = str(report)
    for part in ("channels: 100 -> ", "parameters: 7,645 -> ", "MB", "forward pass:", "relative difference", "left"):
        assert part in text
