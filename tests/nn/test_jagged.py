"""Jagged nested tensors `[N, j, *S, C]` are normalized by their values, which contain no padding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from batchnorm import functional, nn
from batchnorm.nn.layer import NormLayer

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*not a leaf Tensor:UserWarning"),  # the compiler reads it of every input
]
LENGTHS = (3, 0, 5, 1)
TAKES = {
    "BatchNorm": nn.BatchNorm, "BatchNorm1d": nn.BatchNorm1d, "BatchRenorm1d": nn.BatchRenorm1d,
    "SyncBatchNorm": nn.SyncBatchNorm, "FrozenBatchNorm1d": nn.FrozenBatchNorm1d, "BatchNormAct1d": nn.BatchNormAct1d,
}  # fmt: skip


@functools.cache
def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    """Return the same tensor for the same lengths, because torch compares ragged sizes by its identity."""
    return torch.tensor([0, *lengths]).cumsum(0)


def jagged(values: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets_of(lengths))


def values(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(
        sum(LENGTHS), *(shape or (4,)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def results(layer: NormLayer, x: Tensor, dy: Tensor, **kwargs: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    given = jagged(x) if kwargs.pop("nested") else x
    y = layer(given, **{k: jagged(v) if given.is_nested else v for k, v in kwargs.items()})
    y = y.values() if given.is_nested else y
    (y * dy).sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    return [y.detach(), x.grad, *gradients, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", TAKES)
def test_a_jagged_tensor_gives_the_same_as_its_values(name: str, training: bool) -> None:
    layer = TAKES[name](4, channel_dim=-1, dtype=torch.float64).train(training)
    other = copy.deepcopy(layer)
    found = results(layer, values(), values(1), nested=True)
    for ours, theirs in zip(found, results(other, values(), values(1), nested=False), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_masks_and_residuals_are_jagged_too() -> None:
    layer = nn.BatchNormAct1d(4, channel_dim=-1, dtype=torch.float64)
    other = copy.deepcopy(layer)
    kwargs = {"residual": values(2), "mask": values(3, 1)[:, 0] > 0}
    found = results(layer, values(), values(1), nested=True, **kwargs)
    for ours, theirs in zip(found, results(other, values(), values(1), nested=False, **kwargs), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_result_has_the_structure_of_x_for_every_rank() -> None:
    for layer, shape in ((nn.BatchNorm(4, channel_dim=-1), (4,)), (nn.BatchNorm2d(4, channel_dim=-1), (6, 4)),
                         (nn.LazyBatchNorm1d(channel_dim=-1), (4,))):  # fmt: skip
        x = jagged(values(0, *shape).float())
        y = layer(x)
        assert (x + y).shape == x.shape  # the same ragged size
        assert_close(y.values(), nn.BatchNorm(4, channel_dim=-1)(x.values()))


def test_the_derivative_is_right() -> None:  # torch has no second one of its views of jagged tensors
    def norm(x: Tensor) -> Tensor:
        return functional.batch_norm(jagged(x), None, None, training=True, channel_dim=-1).values()

    assert torch.autograd.gradcheck(norm, values().requires_grad_())
    parts = list(values().split(LENGTHS))
    leaf = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    functional.batch_norm(leaf, None, None, training=True, channel_dim=-1).values().pow(3).sum().backward()
    dense = values().requires_grad_()
    norm(dense).pow(3).sum().backward()
    assert_close(leaf.grad.values(), dense.grad)


def test_it_compiles() -> None:
    layer = nn.BatchNorm(4, channel_dim=-1)
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, (2, 6)):
        x = torch.randn(sum(lengths), 4)
        assert_close(compiled(jagged(x, lengths)).values(), other(jagged(x, lengths)).values())
        assert_close(layer.running_var, other.running_var)


def strided() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)])


def with_holes() -> Tensor:
    start, lengths = torch.tensor([0, 1]), torch.tensor([3, 2])
    return torch.nested.narrow(torch.randn(2, 6, 4), 1, start, lengths, layout=torch.jagged)


def swapped() -> Tensor:
    return jagged(values()).transpose(1, 2)


def ragged() -> Tensor:
    return jagged(values())


@pytest.mark.parametrize(
    ("layer", "make", "message"),
    [
        (nn.BatchNorm1d(4), ragged, "got channel_dim=1. Otherwise pad it with x.to_padded_tensor"),
        (nn.BatchNorm(4, channel_dim=-1), strided, "got the strided layout. Otherwise pad it"),
        (nn.BatchNorm(4, channel_dim=-1), with_holes, "got a view with holes. Otherwise pad it"),
        (nn.BatchNorm(4, channel_dim=-1), swapped, r"got \[4, 4, j\d+\]"),
        (nn.GhostBatchNorm1d(4, channel_dim=-1), ragged, "expects a dense x, got a nested tensor. Pad it with"),
        (nn.DomainBatchNorm1d(4, num_domains=2), ragged, "expects a dense x, got a nested tensor"),
        (nn.ConditionalBatchNorm1d(4, num_classes=2), strided, "expects a dense x, got a nested tensor"),
        (nn.DecorrelatedBatchNorm1d(4), ragged, "expects a dense x, got a nested tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "layer_name", ""),
)  # fmt: skip
def test_errors_for_other_nested_tensors_name_the_fix(
    layer: NormLayer, make: Callable[[], Tensor], message: str
) -> None:
    extra = (0,) if isinstance(layer, nn.DomainBatchNorm1d | nn.ConditionalBatchNorm1d) else ()
    with pytest.raises(ValueError, match=message):
        layer(make(), *extra)
    assert not layer.num_batches_tracked.any()


def test_a_mask_or_residual_of_another_structure_is_refused() -> None:
    x = jagged(values())
    layer = nn.BatchNormAct1d(4, channel_dim=-1, dtype=torch.float64)
    for name, given in (
        ("residual", values()), ("residual", jagged(values(), (5, 4))), ("residual", strided()),
        ("mask", torch.ones(4, 5)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"BatchNormAct1d expects {name} to be a jagged nested tensor of shape"):
            layer(x, **{name: given})
