"""`insert_batchnorm`: a network that computes what it did, and now trains with batch normalization."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.surgery.insert import insert_batchnorm


def plain_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Dropout(0.5),
    )  # fmt: skip


def batches(*sizes: int, shape: tuple[int, ...] = (3, 9, 9), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [(torch.randn(n, *shape, dtype=torch.float64) * 2 + 1).to(dtype) for n in sizes]


AFTER: dict[str, tuple[Any, list[str]]] = {
    "class": (nn.Conv2d, ["0", "2"]),
    "classes": ((nn.Conv2d, nn.Linear), ["0", "2", "6"]),
    "pattern": ("[02]", ["0", "2"]),
    "patterns": (["0", "6"], ["0", "6"]),
    "predicate": (lambda path, module: path > "1" and hasattr(module, "stride"), ["2"]),
}


@pytest.mark.parametrize("how", AFTER)
def test_the_output_stays(how: str) -> None:
    after, places = AFTER[how]
    model, data = plain_network().double(), batches(4, 7, 1)
    model[2].eval()
    inserted, report = insert_batchnorm(model, after=after, data=data)
    assert inserted.training and inserted[3].training
    assert not inserted[2].training and not any(m.training for m in inserted[2].modules())
    assert [change.path for change in report.changed] == places
    assert [path for path, m in inserted.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [
        f"{place}.1" for place in places
    ]
    x = batches(5)[0]
    assert_close(inserted.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def test_statistics_are_those_of_all_the_data_together() -> None:
    model, data = plain_network().double(), batches(4, 7, 1)
    inserted, _ = insert_batchnorm(model, after="0", data=data)
    y = model[0](torch.cat(data)).transpose(0, 1).flatten(1)
    layer = inserted[0][1]
    assert type(layer) is bn.BatchNorm2d
    assert_close(layer.running_mean, y.mean(1))
    assert_close(layer.running_var, y.var(1))
    assert_close(layer.bias, y.mean(1))
    assert_close(layer.weight, (y.var(1) + layer.eps).sqrt())
    # On all the data at once, training is the identity too, but for m/(m - 1).
    z = inserted[0].train()(torch.cat(data)).detach()
    assert_close(z, model[0](torch.cat(data)).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (nn.Linear(3, 4), (3,), bn.BatchNorm1d),
        (nn.Conv1d(3, 4, 1), (3, 6), bn.BatchNorm1d),
        (nn.Conv3d(3, 4, 1), (3, 4, 4, 4), bn.BatchNorm3d),
    ],
)
def test_the_class_is_that_of_the_rank(module: nn.Module, shape: tuple[int, ...], kind: type) -> None:
    model, data = nn.Sequential(module.double()), batches(6, 6, shape=shape)
    inserted, _ = insert_batchnorm(model, after=type(module), data=data)
    assert type(inserted[0][1]) is kind
    assert_close(inserted.eval()(data[0]), model.eval()(data[0]))


def test_the_model_itself_and_shared_modules() -> None:
    conv, data = nn.Conv2d(3, 3, 1).double(), batches(4)
    alone, report = insert_batchnorm(conv, after=nn.Conv2d, data=data, inplace=True)
    assert isinstance(alone, nn.Sequential) and alone[0] is conv
    assert report.changed[0].path == ""
    assert_close(alone.eval()(data[0]), conv(data[0]))
    twice = nn.Sequential(conv, nn.ReLU(), conv)
    both, report = insert_batchnorm(twice, after=nn.Conv2d, data=data)
    assert both[0] is both[2]
    assert len(report.changed) == 1
    assert_close(both.eval()(data[0]), twice(data[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_channels_and_half_precision(dtype: torch.dtype) -> None:
    model = plain_network().to(dtype).eval()
    with torch.no_grad():
        model[0].weight[0].zero_()
    data = batches(4, 6, dtype=dtype)
    inserted, _ = insert_batchnorm(model, after=nn.Conv2d, data=data)
    assert inserted[0][1].weight.dtype == torch.float32
    assert_close(inserted(data[0]), model(data[0]))


def test_it_trains() -> None:
    model, x = plain_network(), torch.randn(64, 3, 9, 9)
    target = (x.mean((1, 2, 3)) > 0).long()
    inserted, _ = insert_batchnorm(model, after=nn.Conv2d, data=[x])
    optimizer = torch.optim.SGD(inserted.parameters(), lr=0.1)
    losses = []
    for _ in range(100):
        loss = F.cross_entropy(inserted(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(image) * scale


def test_batches_are_given_as_the_model_takes_them() -> None:
    model, x = Labelled(), torch.randn(4, 3, 5, 5)
    for data in ([x], [(x, torch.zeros(4))], [{"image": x, "label": torch.zeros(4)}], [x.numpy()]):
        inserted, _ = insert_batchnorm(model, after="conv", data=data)
        assert_close(inserted.eval()(x), model(x))
    inserted, _ = insert_batchnorm(model, after="conv", data=[{"x": x}], forward=lambda m, batch: m(batch["x"], 2.0))
    assert_close(inserted.eval()(x), model(x))


# Errors, which leave the model unchanged


def assert_untouched(model: nn.Module, work: Callable[[], Any], error: type[Exception], text: str) -> None:
    model.train()
    next(model.modules()).training = False  # a mode that train() would not give back
    modules, modes = list(model.modules()), [m.training for m in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=text):
        work()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def broken() -> Iterator[Tensor]:
    yield torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    raise OSError("the disk is gone")


NAN = torch.full((2, 3, 9, 9), float("nan"))
GOOD = [torch.zeros(2, 3, 9, 9).random_(0, 9, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("after", "data", "error", "text"),
    [
        (nn.Conv2d, broken, OSError, "the disk is gone"),
        (nn.Conv2d, [], ValueError, "at least one batch, got none"),
        (nn.Conv2d, [torch.zeros(2, 4, 9, 9)], RuntimeError, "channels"),
        (nn.Conv2d, [NAN], ValueError, r"expects finite outputs, got NaN or infinity from 0 \(Conv2d\)"),
        (nn.Conv2d, GOOD[0], TypeError, "insert_batchnorm expects data to be an iterable of batches, got one Tensor"),
        (nn.Conv2d, [3], TypeError, "insert_batchnorm expects batches that are tensors"),
        (nn.Conv3d, GOOD, ValueError, r"chooses none of 9. Choose from: 0, 1, 2"),
        (None, GOOD, ValueError, "expects `after` to choose a module, got None"),
        ("nothing*", GOOD, ValueError, "got 'nothing\\*', which matches none"),
        ("6", [GOOD[0][:1]], ValueError, "more than one value per channel, got one from 6"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(after: Any, data: Any, error: type[Exception], text: str) -> None:
    model = plain_network()
    given = data() if callable(data) else data
    assert_untouched(model, lambda: insert_batchnorm(model, after, given, inplace=True), error, text)


class Unusual(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.fc, self.unused = nn.Conv2d(3, 3, 1), nn.Linear(9, 4), nn.Conv2d(3, 3, 1)
        self.lstm = nn.LSTM(9, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "last":
            return self.fc(x)
        if self.kind == "tuple":
            return self.lstm(x[:, 0])[0]
        if self.kind == "attribute":
            return self.conv(x) * self.conv.weight.sum()
        if self.kind == "asks":
            return self.conv(x) if isinstance(self.conv, nn.Conv2d) else x
        return self.conv(x)


@pytest.mark.parametrize(
    ("kind", "after", "text"),
    [
        ("last", nn.Linear, r"channels in the second dimension, got \[2, 3, 9, 4\] from fc"),
        ("tuple", "lstm", "return one tensor .*, got a tuple from lstm"),
        ("attribute", "conv", "which raised AttributeError: 'Sequential' object has no attribute 'weight'"),
        ("asks", "conv", "whose output changed by"),
        ("conv", ["conv", "unused"], r"got data that do not reach unused \(Conv2d\)"),
    ],
)
def test_models_that_are_refused(kind: str, after: Any, text: str) -> None:
    model = Unusual(kind)
    assert_untouched(model, lambda: insert_batchnorm(model, after, GOOD, inplace=True), ValueError, text)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="insert_batchnorm expects a torch.nn.Module, got int"):
        insert_batchnorm(3, after=nn.Conv2d, data=GOOD)
    with pytest.raises(ValueError, match="expects eps > 0, got 0"):
        insert_batchnorm(plain_network(), after=nn.Conv2d, data=GOOD, eps=0)
