"""`use_domain`: the domain of a whole model, over threads, checkpointing and compilation."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm.nn.domain import DomainBatchNorm, DomainBatchNorm1d, DomainBatchNorm2d, keep_domain, use_domain
from tests.nn.by_rows import randomized, step_results

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")

DOMAINS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])


def make(kind: type[DomainBatchNorm] = DomainBatchNorm2d) -> DomainBatchNorm:
    return randomized(kind(3, num_domains=3, dtype=torch.float64))


def test_the_innermost_domain_counts_and_an_argument_counts_more() -> None:
    layer = make(DomainBatchNorm1d).eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    with use_domain(0):
        with use_domain(torch.tensor([1, 1, 2, 2])):
            assert_close(layer(x), torch.cat([layer(x[:2], 1), layer(x[2:], 2)]))
        assert_close(layer(x), layer(x, 0))
        assert_close(layer(x, 2), layer.select(2)(x))
        with pytest.raises(RuntimeError, match="stop"), use_domain(1):
            raise RuntimeError("stop")
        assert_close(layer(x), layer(x, 0))
    with pytest.raises(ValueError, match="DomainBatchNorm1d expects a domain, got none. Pass layer"):
        layer(x)


def test_threads_choose_for_themselves_and_replicas_take_it_along() -> None:
    layer, x = make(DomainBatchNorm1d).eval(), torch.randn(4, 3, dtype=torch.float64)
    found: dict[str, Any] = {}

    def call(name: str, module: nn.Module) -> None:
        try:
            found[name] = module(x)
        except ValueError as error:
            found[name] = error

    def other() -> None:
        call("without", layer)
        call("replica", replica)
        with use_domain(2):
            call("within", layer)

    with use_domain(1):
        replica = layer._replicate_for_data_parallel()
        replica._buffers, replica._parameters = layer._buffers, layer._parameters
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert_close(layer(x), layer(x, 1))
    assert "in the same thread" in str(found["without"])
    assert_close(found["replica"], layer(x, 1))
    assert_close(found["within"], layer(x, 2))
    assert layer._replica_domain is None


def test_checkpointing_keeps_the_domain_of_the_first_pass_or_refuses() -> None:
    plain = make()
    layer, x = copy.deepcopy(plain), torch.randn(9, 3, 2, 2, dtype=torch.float64)
    expected = step_results(plain, lambda m, x: m(x, 1), x)

    def kept(module: nn.Module, x: Tensor) -> Tensor:
        with use_domain(1):
            return checkpoint(module, x, use_reentrant=False, context_fn=keep_domain)

    with use_domain(2):  # around the backward: another's
        assert_close(step_results(layer, kept, x), expected)

    def lost(module: nn.Module, x: Tensor) -> Tensor:
        with use_domain(1):
            return checkpoint(module, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match="expects the domain of the first pass .*context_fn=batchnorm"):
        step_results(layer, lost, x)
    with use_domain(2), pytest.raises(RuntimeError, match="forward pass has ended, or another is active"):
        step_results(layer, lost, x)


def test_a_compiled_layer_keeps_the_domain_of_its_first_pass() -> None:
    plain = make()
    layer, x = copy.deepcopy(plain), torch.randn(9, 3, 2, 2, dtype=torch.float64)
    expected = step_results(plain, lambda m, x: m(x, 1), x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def kept(module: nn.Module, x: Tensor) -> Tensor:
        with use_domain(1):
            return checkpoint(compiled, x, use_reentrant=False, context_fn=keep_domain)

    with use_domain(2):
        assert_close(step_results(layer, kept, x), expected)


def test_compiled_code_sees_which_domain_is_chosen() -> None:
    layer = make().eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    for domain in (0, 2, 0, DOMAINS, 1, DOMAINS.flip(0)):
        with use_domain(domain):
            assert_close(compiled(x), layer(x, domain))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def within(x: Tensor) -> Tensor:
        with use_domain(1):
            first = layer(x)
        with use_domain(2):
            return first + layer(x)

    assert_close(within(x), layer(x, 1) + layer(x, 2))
    with pytest.raises(ValueError, match="got none"):
        layer(x)


def test_use_domain_refuses_what_is_no_domain() -> None:
    for domain in ("real", 1.0, True, None):
        with pytest.raises(TypeError, match="use_domain expects an int or an int64 tensor"), use_domain(domain):
            pass
