"""Running statistics that cannot be written: a clear error, before any of them or the counter changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from batchnorm import functional
from tests.nn.test_family_contract import FAMILY


def expanded(t: Tensor) -> Tensor:
    return t.flatten()[0].expand(t.shape)


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


KINDS = {expanded: "an expanded tensor", inference: "torch.inference_mode", leaf: "a leaf that requires a gradient"}
CASES = [
    (name, buffer, kind)
    for name, member in FAMILY.items()
    for buffer, t in member.make(4).named_buffers()
    for kind in KINDS
    if member.moves and not (kind is leaf and not t.is_floating_point()) and not (kind is expanded and t.numel() == 1)
]


def assert_refused(name: str, buffer: str, kind: Callable[[Tensor], Tensor], *, compiled: bool) -> None:
    layer, x = FAMILY[name].make(4), torch.randn(6, 4, 2, 3) + 3.0
    setattr(layer, buffer, kind(getattr(layer, buffer)))
    before = {key: t.detach().clone() for key, t in layer.named_buffers()}
    call = torch.compile(layer, backend="eager") if compiled else layer
    for extra in FAMILY[name].extra(6) or [None]:
        for choice in [None] if extra is None else [extra, int(extra[0])]:
            with pytest.raises(RuntimeError, match=f"expects {buffer} to be a buffer that training can") as raised:
                call(x, *([] if choice is None else [choice]))
            assert KINDS[kind] in str(raised.value)
    assert all(torch.equal(t, before[key]) for key, t in layer.named_buffers())


@pytest.mark.parametrize(("name", "buffer", "kind"), CASES)
def test_nothing_changes_in_any_layer(name: str, buffer: str, kind: Callable[[Tensor], Tensor]) -> None:
    assert_refused(name, buffer, kind, compiled=False)


@pytest.mark.usefixtures("nothing_compiled_before")
@pytest.mark.parametrize("kind", [expanded, leaf])
@pytest.mark.parametrize("name", ["BatchNorm2d", "GhostBatchNorm2d"])
def test_nothing_changes_in_a_compiled_layer(name: str, kind: Callable[[Tensor], Tensor]) -> None:
    assert_refused(name, "running_var", kind, compiled=True)


def test_rows_that_share_memory_are_refused() -> None:
    layer = FAMILY["DomainBatchNorm2d"].make(4)
    layer.running_var = layer.running_var[0].expand(2, 4)  # each row alone can be written
    for choice in (1, torch.arange(6) % 2):
        with pytest.raises(RuntimeError, match="DomainBatchNorm2d expects running_var to be a buffer"):
            layer(torch.randn(6, 4, 2, 2), choice)
    assert not layer.num_batches_tracked.any()


def test_a_buffer_that_can_be_written_is_not_refused() -> None:
    x, layer = torch.randn(6, 4, 2, 2), FAMILY["BatchNorm2d"].make(4)
    layer.running_mean = torch.zeros(8)[::2]
    with torch.no_grad():  # a leaf can be written there
        layer.running_var.requires_grad_()
        layer(x)
    layer.running_var.requires_grad_(False)
    with torch.inference_mode():
        layer.running_var = layer.running_var.clone()
        layer(x)
    assert layer.num_batches_tracked == 2


def test_evaluation_writes_nothing_and_refuses_nothing() -> None:
    x, running = torch.randn(6, 4, 2, 2), (torch.zeros(1).expand(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="^batch_norm expects running_mean to be a buffer"):
        functional.batch_norm(x, *running, training=True)
    functional.batch_norm(x, *running)
