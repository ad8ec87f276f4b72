"""Operators called with arguments that no caller should pass: an exception or a result, never a crash.

A child process makes the calls and names each before it begins, so that the parent knows the call that ended it. With
`--library`, the child loads a build with sanitizers, which end the process at the first invalid access.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.attack.tally import Tally

ROOT = Path(__file__).parents[2]
MEMORY = 2**34
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REFUSALS = (RuntimeError, AttributeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError)


def ordinary(rng: np.random.Generator) -> dict[str, Any]:
    """Return valid arguments of every operator, by name."""
    from batchnorm import ops

    dtype = DTYPES[rng.integers(len(DTYPES))]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    samples, channels = int(rng.integers(1, 7)), int(rng.integers(1, 20))
    shape = (samples, channels, *(int(n) for n in rng.integers(1, 8, rng.integers(0, 4))))
    rows = int(rng.integers(1, 4)) if rng.random() < 0.4 else None
    vector = (channels,) if rows is None else (rows, channels)

    def random(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.from_numpy(rng.uniform(0.1, 2.0, shape)).to(dtype)

    x = random(*shape, dtype=dtype)
    if rng.random() < 0.5:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    values: dict[str, Any] = {name: random(*vector) for name in ("mean", "mean_low", "var", "weight", "bias")}
    values |= {name: random(*shape, dtype=dtype) for name in ("dy", "residual", "y")}
    values |= {name: random(*vector) for name in ("mean_dxhat", "mean_dxhat_xhat")}
    values |= {name: random(channels) for name in ("running_mean", "running_var")}
    values |= {
        "x": x,
        "index": None if rows is None else torch.from_numpy(rng.integers(0, rows, samples)),
        "weights": random(samples, *shape[2:]) if rng.random() < 0.5 else None,
        "groups": rows or 1,
        "num_batches_tracked": torch.tensor(3),
        "m": x.numel() // channels,
        "count": None if rng.random() < 0.5 else torch.tensor(5.0, dtype=torch.float64),
        "momentum": None if rng.random() < 0.3 else 0.1,
        "skip_nonfinite": bool(rng.random() < 0.5),
        "eps": 1e-5,
        "activation": str(rng.choice(list(ops.ACTIVATIONS))),
        "negative_slope": 0.2,
        "need_dz": bool(rng.random() < 0.5),
    }
    return values


def _freed(t: Tensor) -> Tensor:
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    return freed


HOSTILE_TENSORS: dict[str, Callable[[Tensor, np.random.Generator], Any]] = {
    "freed": lambda t, rng: _freed(t),
    "another dtype": lambda t, rng: t.to(
        (*DTYPES, torch.int64, torch.int32, torch.bool, torch.complex64)[rng.integers(8)]
    ),
    "one more dimension": lambda t, rng: t.unsqueeze(int(rng.integers(t.dim() + 1))),
    "one dimension": lambda t, rng: t.flatten(),
    "no dimension": lambda t, rng: t.sum(),
    "shorter": lambda t, rng: t.narrow(0, 0, max(t.shape[0] - 1, 0)) if t.dim() else t,
    "longer": lambda t, rng: torch.cat([t, t]) if t.dim() else t.expand(3),
    "empty": lambda t, rng: t.new_empty((0, *t.shape[1:])),
    "no channels": lambda t, rng: t.new_empty((*t.shape[:1], 0, *t.shape[2:])),
    "expanded": lambda t, rng: t.flatten()[:1].expand(t.shape) if t.numel() else t,
    "flipped": lambda t, rng: t.flip(0) if t.dim() else t,
    "transposed": lambda t, rng: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "every second": lambda t, rng: torch.stack([t, t], -1)[..., 0],
    "overlapping": lambda t, rng: torch.ones(t.numel() + 1).to(t.dtype).as_strided(t.shape, (1,) * t.dim()),
    "meta": lambda t, rng: t.to("meta"),
    "sparse": lambda t, rng: t.to_sparse(),
    "conjugate": lambda t, rng: t.to(torch.complex64).conj(),
    "negative view": lambda t, rng: torch._neg_view(t),
    "zero tensor": lambda t, rng: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "not finite": lambda t, rng: (
        torch.full_like(t, (float("nan"), float("inf"))[rng.integers(2)]) if t.is_floating_point() else t
    ),
    "negative": lambda t, rng: -t,
    "huge": lambda t, rng: torch.full_like(t, 2**62) if t.dtype == torch.int64 else t * 1e30,
    "a list": lambda t, rng: [t],
    "absent": lambda t, rng: None,
}
HOSTILE_NUMBERS = (0, -1, 2**31, 2**62, -(2**62), 1e300, float("nan"), float("inf"), None, "relu")
HOSTILE_TEXTS = ("", "Relu", "none\0relu", "relu" * 10_000, "\u03b3", None, 3)


def spoiled(value: Any, rng: np.random.Generator) -> tuple[str, Any]:
    """Return a hostile value instead of this one, and its name."""
    if isinstance(value, Tensor):
        name = str(rng.choice(list(HOSTILE_TENSORS)))
        return name, HOSTILE_TENSORS[name](value, rng)
    hostile = HOSTILE_TEXTS if isinstance(value, str) else HOSTILE_NUMBERS
    chosen = hostile[rng.integers(len(hostile))]
    return repr(chosen)[:20], chosen


def call(number: int, rng: np.random.Generator, announce: Callable[[str], None]) -> str | None:
    """Make one call; return what is wrong, if anything."""
    from batchnorm.ops.schemas import SIGNATURES

    name = str(rng.choice(list(SIGNATURES)))
    values, names = ordinary(rng), SIGNATURES[name].arguments
    changed = []
    for argument in rng.choice(names, int(rng.integers(1, min(4, len(names) + 1))), replace=False):
        try:
            what, values[argument] = spoiled(values[argument], rng)
        except (RuntimeError, TypeError):
            continue  # torch cannot make this tensor
        changed.append(f"{argument} {what}")
    description = f"{name}, {', '.join(changed)}"
    announce(f"try {number}: {description}")
    arguments = [values[argument] for argument in names]
    untouched = [] if name == "update_running_" else [t for t in arguments if _readable(t)]
    copies = [t.clone() for t in untouched]
    try:
        getattr(torch.ops.batchnorm, name)(*arguments)
    except REFUSALS as error:
        if "INTERNAL ASSERT" in str(error):
            return f"{description}: {error}"
    if not all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(untouched, copies, strict=True)):
        return f"{description}: an argument has changed"
    return None


def _readable(t: Any) -> bool:
    if not isinstance(t, Tensor) or t.is_meta or t.layout != torch.strided or t._is_zerotensor():
        return False
    return t.numel() == 0 or t.untyped_storage().nbytes() > 0


def child(seconds: float, calls: int, seed: int, start: int, only: int | None, library: str) -> None:
    """Make at least `calls` calls, and more until the time is over; write lines of JSON for each."""
    if library:
        os.environ["BATCHNORM_CPU_CAPABILITY"] = "eager"
    else:  # a huge size is then an error, and does not use up the machine's memory; sanitizers have their own limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from batchnorm.compiled import Kernels
    from batchnorm.ops import compiled

    if library:
        del os.environ["BATCHNORM_CPU_CAPABILITY"]
        compiled._compiled = compiled._Compiled(Path(library), Kernels(Path(library)))
        assert compiled.cpu_capabilities(), compiled.descriptions()

    def announce(text: str) -> None:
        print(json.dumps({"begins": text}), flush=True)

    end, number = time.monotonic() + seconds, start if only is None else only
    while only is None or number == only:
        problem = call(number, np.random.default_rng([seed, number]), announce)
        print(json.dumps({"ended": number, "problem": problem}), flush=True)
        number += 1
        if time.monotonic() > end and number >= start + calls:
            break


def attack(tally: Tally, library: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Call operators in child processes; begin a new one after each crash."""
    end, start = time.monotonic() + tally.seconds, 0
    while True:
        left, calls = end - time.monotonic(), tally.at_least - tally.tried
        arguments = [left, calls, tally.seed, start, tally.only, str(library or "")]
        source = f"from tests.attack.operators import child; child(*{arguments!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        output, errors = process.communicate()
        begun = None
        for line in output.splitlines():
            event = json.loads(line)
            begun = event.get("begins")
            if "ended" in event:
                start, begun = event["ended"] + 1, None
                tally.tried += 1
                if event["problem"]:
                    tally.fail(event["ended"], event["problem"])
        if process.returncode == 0:
            return
        last = errors.strip().splitlines()
        detail = next(
            (line for line in last if "ERROR: AddressSanitizer" in line or "runtime error" in line), last[-1:]
        )
        tally.tried += 1
        tally.failures.append(f"{begun}: exit status {process.returncode}, {detail}")
        start += 1
        if tally.only is not None or begun is None or (time.monotonic() > end and tally.tried >= tally.at_least):
            return
