"""Tracing a model is not seen by other threads, and an interruption leaves nothing changed."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import batchnorm as bn
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.execution.calling import eager
from batchnorm.models.graphs.model_graph import trace

X = torch.randn(3, 4)
SERVED = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "fold": lambda model: bn.fold(model, X),
    "accelerate": lambda model: bn.accelerate(model, X),
    "diagnose": lambda model: bn.diagnose(model, [X, X + 1]),
    "drop_redundant_bias": lambda model: bn.drop_redundant_bias(model, example_inputs=X),
}


def of_the_process() -> tuple[Any, ...]:
    """Everything that torch's tracers replace."""
    module = torch.fx._symbolic_trace
    return (
        nn.Module.__call__, nn.Module.__getattr__, math.sqrt, sys.modules[__name__].sqrt, module._Patcher,
        module._is_fx_tracing_flag, torch.compiler.is_compiling(), torch.compiler.is_exporting(), max, min,
        [found for found in warnings.filters if "sympy" not in str(found)],  # importing it adds one
    )  # fmt: skip


sqrt = math.sqrt
BEFORE: list[Any] = []


def in_another_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


class Net(nn.Module):
    """Runs `during` in each call, also of its tracing."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.linear, self.norm, self.act = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()
        self.scale = nn.Parameter(torch.ones(4))
        self.during = during

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.linear(x)))
        self.during()
        return y * self.scale


class Sizes(Net):
    """Calls functions of `math` on sizes, and a function that `torch.fx.wrap` registered."""

    def forward(self, x: Tensor) -> Tensor:
        return wrapped(super().forward(x)) / math.sqrt(x.shape[-1]) / sqrt(x.shape[-1])


class Decides(Net):
    """Not traceable by torch.fx: only `torch.export` gives its graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] == 4 else x


def wrapped(x: Tensor) -> Tensor:
    return x * 2 if x.dim() > 1 else x


fx.wrap("wrapped")


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what an export imports, because that may add filters of warnings."""
    trace(Net().eval(), Inputs.of(X), ways=("export",))


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_of_the_process_changes_while_a_model_is_traced(verb: str) -> None:
    seen: list[tuple[Any, ...]] = []
    before = of_the_process()
    model = Net(lambda: seen.append(of_the_process())).eval()
    VERBS[verb](model)
    assert len(seen) > 1
    for found in seen:
        assert found == before


@pytest.mark.parametrize("kind", [Net, Sizes, Decides])
@pytest.mark.parametrize("verb", VERBS)
def test_other_threads_call_models_as_usual_while_a_model_is_traced(verb: str, kind: type[Net]) -> None:
    seen: list[Tensor] = []
    expected, before = SERVED(X), of_the_process()
    x, served, roots = X, SERVED, set[object]()

    def during() -> None:  # an error here would only make the model untraceable
        seen.append(in_another_thread(lambda: served(x)))
        roots.add(in_another_thread(lambda: math.sqrt(2.0)))

    VERBS[verb](kind(during).eval())
    assert len(seen) > 1
    assert roots == {math.sqrt(2.0)}
    assert all(type(y) is Tensor and torch.equal(y, expected) for y in seen)
    assert of_the_process() == before


def test_functions_of_math_and_wrapped_functions_are_recorded() -> None:
    model = Sizes().eval()
    found = trace(model, Inputs.of(X), ways=("fx",))
    targets = [node.target for node in found.graph.nodes if node.op == "call_function"]
    assert wrapped in targets
    assert math.sqrt in targets
    assert torch.allclose(found.module(X), model(X))
    assert wrapped.__name__ == "wrapped" and not hasattr(wrapped, "__wrapped__")


class Gate(nn.Module):
    """Waits in each call until it may return."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.opened = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.entered.set()
        self.opened.wait()
        return x


class CalledElsewhere(Net):
    """Multiplies while another thread is inside a call of a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        self.gate.entered.clear(), self.gate.opened.clear()
        thread = threading.Thread(target=self.gate, args=(None,))
        thread.start()
        self.gate.entered.wait()
        try:
            return super().forward(x)
        finally:
            self.gate.opened.set()
            thread.join()


def test_an_export_does_not_record_a_call_in_another_thread() -> None:
    found = trace(CalledElsewhere().eval(), Inputs.of(X), ways=("export",))
    paths = [found.paths[node] for node in found.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    assert paths and not [path for path in paths if "gate" in path]


@pytest.mark.parametrize(("way", "kind"), [("fx", Net), ("fx", Sizes), ("export", Net), ("export", Decides)])
def test_threads_trace_at_the_same_time(way: str, kind: type[Net]) -> None:
    before = of_the_process()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            model = kind().eval()
            for _ in range(2):
                found = trace(model, Inputs.of(X), ways=(way,))
                assert torch.allclose(found.module(X), model(X))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert of_the_process() == before


def test_compiled_models_run_compiled_again_after_blocks_of_several_threads() -> None:
    import torch._dynamo.eval_frame as dynamo

    before = dynamo._stance.stance
    first, second = eager(), eager()
    first.__enter__()
    assert dynamo._stance.stance == "force_eager"
    second.__enter__()
    first.__exit__(None, None, None)  # in another order than nested blocks
    assert dynamo._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert dynamo._stance.stance == before
    with eager():
        assert dynamo._stance.stance == "force_eager"
    assert dynamo._stance.stance == before


@pytest.mark.parametrize("kind", [Net, Sizes, Decides])
@pytest.mark.parametrize("at", range(1, 12, 2))
def test_an_interruption_in_a_call_leaves_nothing_changed(kind: type[Net], at: int) -> None:
    calls: list[int] = []

    def during() -> None:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)

    model = kind().eval()
    before, attributes = of_the_process(), [dict(vars(m)) for m in model.modules()]
    model.during = during
    try:
        trace(model, Inputs.of(X))
    except KeyboardInterrupt:
        assert len(calls) >= at
    del model.during
    assert of_the_process() == before
    for module, held in zip(model.modules(), attributes, strict=True):
        held.pop("during", None)
        assert vars(module) == held
    assert all(type(m._parameters) is dict for m in model.modules())


INTERRUPTED = """
import math, random, signal, sys, time, warnings
import torch
from torch import nn
import batchnorm as bn

def stop(*_):
    raise KeyboardInterrupt

def of_the_process():
    return nn.Module.__call__, nn.Module.__getattr__, math.sqrt, torch.fx._symbolic_trace._is_fx_tracing_flag

torch.set_num_threads(1)
block = lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
model, x = nn.Sequential(*[block() for _ in range(3)]).eval(), torch.randn(4, 3)
before = of_the_process()
keys = [set(vars(m)) for m in model.modules()]
signal.signal(signal.SIGALRM, stop)
verbs = [lambda: bn.fold(model, x), lambda: bn.accelerate(model, x), lambda: bn.diagnose(model, [x, x])]
for verb in verbs:
    verb()
    began = time.perf_counter()
    verb()
    took = time.perf_counter() - began
    end, stopped = time.perf_counter() + 0.5, 0
    while time.perf_counter() < end or not stopped:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, took))
            verb()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            stopped += 1
        assert of_the_process() == before
        assert [set(vars(m)) for m in model.modules()] == keys
        assert all(type(m._parameters) is dict for m in model.modules())
    print(stopped)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
def test_interruptions_at_random_moments_leave_nothing_changed() -> None:
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split()) == 3
