"""Every function that changes a model, interrupted at random moments by a signal, as Ctrl-C does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

import batchnorm as bn
from tests.attack.tally import Tally
from tests.surgery.accelerate.test_failures import Snapshot
from tests.surgery.test_faults import VERBS, X, prepared, residual

Verb = tuple[Callable[[], nn.Module], Callable[[nn.Module, torch.optim.Optimizer], object]]

READERS: dict[str, Verb] = {
    "diagnose": (residual, lambda model, _: bn.diagnose(model, [X, 2 * X])),
    "diagnose a model": (residual, lambda model, _: bn.diagnose(model)),
    "fold a copy": (residual, lambda model, _: bn.fold(model, X)),
    "recalibrate a copy": (residual, lambda model, _: bn.recalibrate(model, [X, 2 * X])),
}


class Interrupted(BaseException):
    """As KeyboardInterrupt, but no real Ctrl-C is taken for it."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted


def attack(tally: Tally) -> None:
    """Interrupt verbs at random moments; each must be undone, or complete."""
    verbs: dict[str, Verb] = {**VERBS, **READERS}
    lasts: dict[str, float] = {}
    patched = nn.Module.__call__, nn.Module.__getattr__
    earlier = signal.signal(signal.SIGALRM, _interrupt)
    try:
        for number, rng in tally.tries():
            name = str(rng.choice(list(verbs)))
            make, run = verbs[name]
            if name not in lasts:
                run(*prepared(make))  # compiled and imported once
                start = time.perf_counter()
                run(*prepared(make))
                lasts[name] = time.perf_counter() - start
            model, optimizer = prepared(make)
            before, tensors = Snapshot(model), _optimized(optimizer)
            interrupted = complete = False
            try:
                signal.setitimer(signal.ITIMER_REAL, max(float(rng.uniform(0, lasts[name])), 1e-6))
                run(model, optimizer)
                complete = True
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted = True
            left = (nn.Module.__call__, nn.Module.__getattr__) != patched
            nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]
            with tally.expecting(number, name):
                assert not left, "torch.nn.Module stays patched"
                if interrupted and not complete:
                    tally.count("interrupted")
                    try:
                        before.assert_same(model)
                        assert _optimized(optimizer) == tensors
                    except AssertionError:
                        # The verb may have ended, except for its return.
                        assert _is_complete(name, make, run, model), "neither as before nor complete"
                        tally.count("complete")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def _optimized(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [sorted(map(id, group["params"])) for group in optimizer.param_groups]


def _is_complete(name: str, make: Callable[[], nn.Module], run: Callable[..., object], model: nn.Module) -> bool:
    """Return whether the model is as the whole verb makes it."""
    other, optimizer = prepared(make)
    run(other, optimizer)
    same_classes = [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in other.modules()]
    ours, theirs = model.state_dict(), other.state_dict()
    modes = [m.training for m in model.modules()] == [m.training for m in other.modules()]
    hooks = Snapshot(model).hooks == Snapshot(other).hooks
    return (
        same_classes and modes and hooks and ours.keys() == theirs.keys()
        and all(torch.allclose(ours[k], theirs[k], equal_nan=True) for k in ours)
    )  # fmt: skip
