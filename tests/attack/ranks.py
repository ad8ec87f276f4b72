"""Two processes of a group, of which one fails: the other hears of it at once, and the group stays usable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm as bn
from tests.attack.tally import Tally
from tests.processes import spawn

TIMEOUT = 60  # seconds until gloo gives up
SOON = 20.0  # seconds within which the other process must hear of a failure, on a busy machine too


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end the process's parent too."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1)
    )


class Data:
    """Batches of this process; reading batch number `fails_at` raises the error."""

    def __init__(self, batches: int, fails_at: int | None, error: BaseException) -> None:
        self.batches, self.fails_at, self.error = batches, fails_at, error

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.batches):
            if number == self.fails_at:
                raise self.error
            yield torch.randn(4, 3, 8, 8)


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("this layer fails on one rank")


def one_try(rng: np.random.Generator, rank: int) -> tuple[str, Callable[[], object]]:
    """Return what the failing rank does wrong, and this rank's call. Both ranks draw the same numbers."""
    verb = str(rng.choice(("single", "sequential", "diagnose")))
    kind = str(rng.choice(("none", "argument", "only", "model", "data", "interruption", "forward")))
    if (verb, kind) == ("diagnose", "only"):
        kind = "argument"
    failing, at = int(rng.integers(2)), int(rng.integers(4))
    here = rank == failing
    model = network()
    options: dict[str, Any] = {}
    error: BaseException = OSError("a disk is gone")
    fails_at = None
    if here and kind == "argument":
        options["max_samples"] = -1
    if here and kind == "only":
        options["only"] = "no such layer"
    if here and kind == "model":
        model[1] = nn.Identity()
    if here and kind in ("data", "interruption"):
        error, fails_at = (Interrupted(), at) if kind == "interruption" else (error, at)
    if here and kind == "forward":
        model[2] = Breaking()
    data = Data(4, fails_at, error)
    if verb == "diagnose":
        return f"diagnose, {kind}", lambda: bn.diagnose(model, data, process_group=dist.group.WORLD, **options)
    return f"recalibrate {verb}, {kind}", lambda: bn.recalibrate(model, data, passes=verb, **options)


def work(rank: int, folder: str, seconds: float, tries: int, seed: int, start: int, only: int | None) -> None:
    """Try at least `tries` times, until the time is over or the group is unusable."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    number = start if only is None else only
    end = time.monotonic() + seconds
    with open(f"{folder}/{rank}.jsonl", "w") as file:
        while True:
            what, call = one_try(np.random.default_rng([seed, number]), rank)
            began, raised = time.monotonic(), None
            try:
                call()
            except Interrupted:
                raised = "Interrupted"
            except Exception as error:
                raised = f"{type(error).__name__}: {error}"[:200]
            event = {"number": number, "what": what, "raised": raised, "seconds": time.monotonic() - began}
            usable = 0
            try:
                over = time.monotonic() > end and number + 1 >= start + tries
                flag = torch.tensor([rank, int(over or only is not None)])
                dist.all_reduce(flag)
                usable = int(flag[0] == 1)
            except RuntimeError:
                pass
            print(json.dumps({**event, "usable": usable}), file=file, flush=True)
            number += 1
            if not usable or int(flag[1]):
                os._exit(0)  # a broken group would wait for its timeout at exit


def attack(tally: Tally, folder: Path) -> None:
    """Let one of two processes fail, again and again."""
    end, start = time.monotonic() + tally.seconds, 0
    while True:
        here = folder / str(start)
        here.mkdir()
        left, tries = end - time.monotonic(), tally.at_least - tally.tried
        spawn(work, (str(here), left, tries, tally.seed, start, tally.only))
        ranks = [[json.loads(line) for line in (here / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
        for first, second in zip(*ranks, strict=True):
            number, what = first["number"], first["what"]
            with tally.expecting(number, what):
                raised = [first["raised"], second["raised"]]
                assert first["usable"] and second["usable"], f"the group is unusable after {raised}"
                assert max(first["seconds"], second["seconds"]) < SOON, f"heard after {first['seconds']:.1f} s"
                # The doctor reports that models differ.
                fails = not what.endswith(", none") and what != "diagnose, model"
                assert [one is not None for one in raised] == [fails, fails], f"raised {raised}"
            start = number + 1
        if tally.only is not None or (time.monotonic() > end and tally.tried >= tally.at_least):
            return
