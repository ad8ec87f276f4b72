"""`use_domain`: the domain of a whole model, over threads, checkpointing and compilation."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm.nn import domain as domain_module
from batchnorm.nn.domain import DomainBatchNorm, DomainBatchNorm1d, DomainBatchNorm2d, keep_domain, use_domain
from tests.nn.groups.by_rows import randomized, step_results

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")

DOMAINS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])


def make(kind: type[DomainBatchNorm] = DomainBatchNorm2d) -> DomainBatchNorm:
    return randomized(kind(3, num_domains=3, dtype=torch.float64))


def test_the_innermost_domain_applies_and_an_argument_overrides_it() -> None:
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


def test_threads_have_their_own_domain_and_replicas_inherit_it() -> None:
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


def test_compiled_code_uses_the_current_domain() -> None:
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


def test_use_domain_refuses_other_values() -> None:
    for domain in ("real", 1.0, True, None):
        with pytest.raises(TypeError, match="use_domain expects an int or an int64 tensor"), use_domain(domain):
            pass


X = torch.randn(4, 3, dtype=torch.float64)


def distinct() -> DomainBatchNorm:
    layer = make(DomainBatchNorm1d).eval()
    for domain in range(3):
        layer.running_mean[domain] = 10.0 * domain
    return layer


def domain_of(call: Callable[[Tensor], Tensor], layer: DomainBatchNorm) -> int | None:
    """Return the domain that a call uses now, or None."""
    try:
        y = call(X)
    except ValueError:
        return None
    return next(domain for domain in range(3) if torch.allclose(y, layer(X, domain)))


def in_tasks(call: Callable[[Tensor], Tensor], layer: DomainBatchNorm) -> dict[str, list[int | None]]:
    """Return the domains that interleaved tasks see."""
    found: dict[str, list[int | None]] = {}

    async def look(name: str, times: int) -> None:
        for _ in range(times):
            await asyncio.sleep(0)
            found.setdefault(name, []).append(domain_of(call, layer))

    async def plain(domain: int) -> None:
        with use_domain(domain):
            await look(f"{domain}", 2)
            with use_domain(0):
                await look(f"{domain} within", 1)
            await look(f"{domain} again", 1)

    async def stacked(domain: int) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_domain(domain))
            await look(f"{domain} in a stack", 2)

    @use_domain(2)
    def in_another_thread() -> int | None:
        return domain_of(call, layer)

    async def stream(domain: int) -> AsyncIterator[int | None]:
        with use_domain(domain):
            for _ in range(2):
                await asyncio.sleep(0)
                yield domain_of(call, layer)

    async def consume() -> None:
        found["stream"] = [domain async for domain in stream(2)]

    async def main() -> None:
        await asyncio.gather(plain(1), plain(2), look("none", 4), stacked(0), stacked(1), consume())
        with use_domain(1):
            found["thread"] = [
                await asyncio.to_thread(domain_of, call, layer),
                await asyncio.to_thread(in_another_thread),
            ]
            found["task"] = [await asyncio.create_task(asyncio.to_thread(domain_of, call, layer))]

    asyncio.run(main())
    return found


IN_TASKS: dict[str, list[int | None]] = {
    "1": [1, 1], "1 within": [0], "1 again": [1], "2": [2, 2], "2 within": [0], "2 again": [2], "none": [None] * 4,
    "0 in a stack": [0, 0], "1 in a stack": [1, 1], "stream": [2, 2], "thread": [1, 2], "task": [1],
}  # fmt: skip


def test_each_task_has_its_own_domain() -> None:
    layer = distinct()
    assert in_tasks(layer, layer) == IN_TASKS
    assert (domain_module._blocks.get(), domain_module._current.blocks, domain_module._current.domain) == ((), (), None)
    with pytest.raises(ValueError, match=r"got none.*in the same thread and task"):
        layer(X)


def test_each_task_has_its_own_domain_in_compiled_code() -> None:
    layer = distinct()
    compiled = torch.compile(layer, backend="eager")
    assert in_tasks(compiled, layer) == IN_TASKS
    torch.compiler.reset()
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    for chosen in (1, 2, 1):  # outside of tasks there is no graph break, as before
        with use_domain(chosen):
            assert domain_of(whole, layer) == chosen

    async def main() -> None:
        with use_domain(1), pytest.raises(torch._dynamo.exc.Unsupported, match="ContextVar"):
            whole(X)

    asyncio.run(main())


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_generators_leave_no_domain_behind(first_ends_first: bool) -> None:
    layer = distinct()

    def generator(domain: int) -> Iterator[int | None]:
        with use_domain(domain):
            while True:
                yield domain_of(layer, layer)

    with use_domain(0):
        one, two = generator(1), generator(2)
        assert [next(one), next(two)] == [1, 2]
        first, second = (one, two) if first_ends_first else (two, one)
        first.close()
        assert domain_of(layer, layer) == (2 if first_ends_first else 1)
        second.close()
        assert domain_of(layer, layer) == 0
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert domain_of(compiled, layer) == 0
    assert domain_of(layer, layer) is None
