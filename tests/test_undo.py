"""Changes are undone completely, whatever a signal interrupts; handlers run as usual elsewhere, and come back."""

from __future__ import annotations

import contextlib
import linecache
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import undo
from batchnorm.undo import UndoOnFailure, Uninterrupted
from batchnorm.walk import restored
from tests.surgery.accelerate.test_failures import Snapshot

SOURCE = Path(bn.__file__).parent
CHANGES = (
    "undo.py", "walk.py", "recalibration/recalibrate.py", "surgery/insert.py", "surgery/redundant_bias.py",
    "surgery/accelerate/accelerate.py", "surgery/convert/convert.py", "surgery/convert/replacement.py",
)  # fmt: skip
NO_HANDLERS = ("try:", "finally:", "with ")  # Python calls no handlers there
Place = tuple[str, int]


class Stop(BaseException):
    """An exception of a handler."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal whose handler raises."""

    def handler(*_: Any) -> None:
        raise Stop

    former = signal.signal(request.param, handler)
    yield request.param
    assert signal.signal(request.param, former) is handler
    assert not undo._held and not undo._blocks


def signalled(work: Callable[[], object], number: int, at: tuple[Place, int] | None) -> Counter[Place]:
    """Count how often each line of the code that changes a model begins; at one of these times, send the signal."""
    seen: Counter[Place] = Counter()
    files = {str(SOURCE / file) for file in CHANGES}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if place[0] not in files or frame.f_code.co_name == "<genexpr>":  # those of closed generators go nowhere
            return None
        if event != "call" and linecache.getline(*place).strip().startswith(NO_HANDLERS):
            return trace
        seen[place] += 1
        if at == (place, seen[place]):
            signal.raise_signal(number)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(3)))
    net[3].register_forward_hook(lambda *_: None)
    net[3].eval()
    return net


def state(model: nn.Module) -> object:
    classes = [f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()]  # fold makes a class each time
    return classes, {key: value.tolist() for key, value in model.state_dict().items()}


X = torch.linspace(0.0, 9.0, 2 * 2 * 4 * 4).cos().reshape(2, 2, 4, 4)
VERBS: dict[str, tuple[Callable[[nn.Module], object], int]] = {
    "convert": (lambda model: bn.convert(model, to="BatchRenorm", inplace=True), 3),
    "freeze": (lambda model: bn.freeze(model, inplace=True), 4),
    "accelerate": (lambda model: bn.accelerate(model, inplace=True), 9),
    "accelerate with an example": (lambda model: bn.accelerate(model, X, inplace=True), 12),
    "insert_batchnorm": (lambda model: bn.insert_batchnorm(model, nn.Conv2d, [X], inplace=True), 3),
    "drop_redundant_bias": (lambda model: bn.drop_redundant_bias(model, inplace=True), 5),
    "recalibrate": (lambda model: bn.recalibrate(model, [X], inplace=True), 3),
    "recalibrate separately": (lambda model: bn.recalibrate(model, [X], shared="separate", inplace=True), 3),
    "fold": (lambda model: bn.fold(model, X, inplace=True), 40),
    "diagnose": (lambda model: bn.diagnose(model, [X, X]), 30),
}


@pytest.mark.parametrize("number", [signal.SIGINT], indirect=True)
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_at_any_line_leaves_all_changes_or_none(verb: str, number: int) -> None:
    run, step = VERBS[verb]
    model = network()
    lines = signalled(lambda: run(model), number, None)
    changed = state(model)
    places = [(place, nth) for place, times in lines.items() for nth in {1, times}]
    interrupted = complete = 0
    for at in places[1::step]:
        model = network()
        before, unchanged = Snapshot(model), state(model)
        try:
            signalled(lambda: run(model), number, at)  # noqa: B023  (called here)
        except Stop:
            interrupted += 1
        else:
            continue  # a line that only the first run reaches
        if state(model) == changed != unchanged:
            complete += 1  # it came at the very end, after the last change
        else:
            before.assert_same(model)
    assert interrupted > 3
    assert complete <= 4


# In callbacks of the garbage collector and of weak references, Python drops what a handler raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_at_random_moments_leave_everything_as_it_was(number: int) -> None:
    model, interrupted, delay = network(), 0, 1e-4
    before = Snapshot(model)

    def change() -> None:
        signal.setitimer(signal.ITIMER_REAL, delay)
        with restored(model, buffers=True, gradients=True):
            model.eval()[1].register_forward_hook(print)
            model[1].running_mean.add_(1.0)
            torch.rand(1)

    former = signal.signal(signal.SIGALRM, signal.getsignal(number))
    try:
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            delay = 1e-4 if delay > 2e-3 else delay * 1.07
            try:
                change()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                interrupted += 1
            before.assert_same(model)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert interrupted > 10


def test_handlers_run_at_once_within_the_block(number: int) -> None:
    done: list[str] = []

    def work() -> None:
        with UndoOnFailure() as outer:
            outer.before(done.append, "outer")
            with UndoOnFailure() as inner:
                inner.before(done.append, "second")
                inner.before(done.append, "first")
                signal.raise_signal(number)
                done.append("never")

    with pytest.raises(Stop):
        work()
    assert done == ["first", "second", "outer"]


def test_handlers_wait_while_changes_are_undone(number: int) -> None:
    done: list[str] = []

    def interrupted() -> None:
        signal.raise_signal(number)
        with UndoOnFailure():  # a nested block does not deliver it
            pass
        done.append("undone")

    def work() -> None:
        with UndoOnFailure() as block:
            block.before(done.append, "the other")
            block.before(interrupted)
            raise KeyError

    with pytest.raises(Stop) as raised:
        work()
    assert isinstance(raised.value.__context__, KeyError)
    assert done == ["undone", "the other"]


@pytest.mark.parametrize("outer", [False, True])
def test_handlers_wait_within_an_uninterrupted_block(number: int, outer: bool) -> None:
    done: list[str] = []

    def work() -> None:
        with UndoOnFailure() if outer else contextlib.nullcontext():
            with Uninterrupted():
                signal.raise_signal(number)
                with UndoOnFailure() as inner:
                    inner.before(done.append, "never")
                    signal.raise_signal(number)
                done.append("all of it")
            done.append("never")

    with pytest.raises(Stop):
        work()
    assert done == ["all of it"]
    with pytest.raises(Stop):  # the handler is back
        signal.raise_signal(number)


def test_a_handler_that_the_block_sets_stays(number: int) -> None:
    def own(*_: Any) -> None: ...

    former = signal.getsignal(number)
    with UndoOnFailure():
        signal.signal(number, own)
    assert signal.signal(number, former) is own


def test_other_threads_undo_without_touching_handlers(number: int) -> None:
    former, found = signal.getsignal(number), []

    def work() -> None:
        model = nn.Dropout()
        with restored(model):
            model.eval()
            found.append(signal.getsignal(number))
        found.append(model.training)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [former, True]


def test_a_failed_step_does_not_stop_the_others() -> None:
    done: list[int] = []

    def fails() -> None:
        raise OSError("disk")

    class Both(undo.Undo):
        def undo(self, error: BaseException | None) -> undo.Steps:
            return [("a.b", fails), ("c", lambda: done.append(1))]

    with (
        pytest.raises(
            RuntimeError, match=r"must be able to restore .*, got failures for a\.b \(OSError: disk\)\. Everything else"
        ),
        Both(),
    ):
        pass
    context = pytest.warns(RuntimeWarning, match="a.b") if sys.version_info < (3, 11) else contextlib.nullcontext()
    with context, pytest.raises(KeyError) as raised, Both():
        raise KeyError
    assert done == [1, 1]
    if sys.version_info >= (3, 11):
        assert "got failures for a.b (OSError: disk)" in raised.value.__notes__[0]
