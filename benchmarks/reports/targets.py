"""The targets, the measurements, and whether they meet the targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.measuring.records import Row, select
from benchmarks.reports.limits_report import limits
from benchmarks.sections import steps
from benchmarks.subjects import cases
from benchmarks.subjects.cases import STEP
from benchmarks.subjects.peers import COMPILED, JAX, OURS, TORCH, TORCH_INPLACE

_CELL = ("shape", "layout", "dtype", "task")
LARGE = {cases.shape_text(s) for s in cases.LARGE}
_INFERENCE = ("BN+ReLU inference", "BN+add+ReLU inference")


@dataclass(frozen=True)
class Verdict:
    """One target under one allocator setting ("" if the allocator does not matter)."""

    what: str
    target: str
    allocator: str
    measured: str
    met: bool | None  # None: not measured


@dataclass(frozen=True)
class Ratio:
    """A peer's time over ours in one case."""

    case: str
    value: float
    share_of_floor: float


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def by_cell(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Return the rows by case, then by contender."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in _CELL), {})[row["contender"]] = row
    return found


def ratios(rows: list[Row], *peers: str) -> list[Ratio]:
    """Return the time of the fastest of these peers over ours, for every case with both."""
    found = []
    for cell, contenders in by_cell(rows).items():
        times = [float(contenders[p]["p50_ms"]) for p in peers if p in contenders]
        if times and OURS in contenders:
            ours = contenders[OURS]
            value = min(times) / float(ours["p50_ms"])
            shape, layout, dtype, task = cell
            found.append(Ratio(f"{shape} {layout} {dtype} {task}", value, float(ours["share_of_floor"])))
    return found


def _range(found: list[Ratio]) -> str:
    least = min(found, key=lambda r: r.value)
    return f"geometric mean {geometric_mean(r.value for r in found):.2f}×, least {least.value:.2f}× ({least.case})"


def _speed_up(
    rows: list[Row],
    what: str,
    target: str,
    allocator: str,
    met: Callable[[float, list[Ratio]], bool],
    *peers: str,
) -> Verdict:
    found = ratios(rows, *peers)
    if not found:
        return Verdict(what, target, allocator, "not measured", None)
    mean = geometric_mean(r.value for r in found)
    return Verdict(what, target, allocator, _range(found), met(mean, found))


def _least(found: list[Ratio]) -> float:
    return min(r.value for r in found)


def layer_verdicts(rows: list[Row], allocator: str) -> list[Verdict]:
    """Judge the times of single layers; torch's time is the faster of its ReLU and its in-place ReLU."""
    rows = list(select(rows, allocator=allocator))
    large = [r for r in rows if r["shape"] in LARGE]
    verdicts = [
        _share_of_floor(large, allocator, "BN+ReLU forward", 0.75),
        _share_of_floor(large, allocator, STEP, 0.70),
    ]
    contiguous = list(select(large, task=STEP, dtype="float32", layout="contiguous"))
    last = list(select(large, task=STEP, dtype="float32", layout="channels-last"))
    half = list(select(large, task=STEP, dtype="bfloat16"))
    small = [r for r in rows if r["shape"] not in LARGE]
    inference = [r for r in rows if r["task"] in _INFERENCE]
    both = (TORCH, TORCH_INPLACE)
    verdicts += [
        _speed_up(
            contiguous, "training step of BN + ReLU, contiguous float32, against torch",
            "geometric mean ≥ 4.5×; each ≥ 2.5× or at 75 % of the floor", allocator,
            lambda mean, found: mean >= 4.5 and all(r.value >= 2.5 or r.share_of_floor >= 0.75 for r in found), *both,
        ),
        _speed_up(
            last, "the same, channels-last float32", "geometric mean ≥ 2.2×, none under 1.4×", allocator,
            lambda mean, found: mean >= 2.2 and _least(found) >= 1.4, *both,
        ),
        _speed_up(
            half, "the same, bfloat16, both layouts", "geometric mean ≥ 3×", allocator,
            lambda mean, found: mean >= 3, *both,
        ),
        _speed_up(
            contiguous, "the same, contiguous float32, against torch.compile", "geometric mean ≥ 10×", allocator,
            lambda mean, found: mean >= 10, COMPILED,
        ),
        _speed_up(
            contiguous, "the same, contiguous float32, against JAX jit", "geometric mean ≥ 3×", allocator,
            lambda mean, found: mean >= 3, JAX,
        ),
        _speed_up(
            small, "small tensors, every layout, dtype and task, against torch",
            "never under 0.95×, geometric mean ≥ 1.0×", allocator,
            lambda mean, found: mean >= 1 and _least(found) >= 0.95, *both,
        ),
        _speed_up(
            inference, "inference of BN + ReLU (+ residual), against torch", "never under 1.0×", allocator,
            lambda mean, found: _least(found) >= 1, *both,
        ),
        _speed_up(
            [r for r in inference if r["shape"] in LARGE],
            "the same, large tensors, where torch makes two passes or more", "each ≥ 1.7×", allocator,
            lambda mean, found: _least(found) >= 1.7, TORCH,
        ),
    ]  # fmt: skip
    return verdicts


def _share_of_floor(large: list[Row], allocator: str, task: str, wanted: float) -> Verdict:
    chosen = select(large, task=task, dtype="float32", layout="contiguous", contender=OURS)
    beyond = [r for r in chosen if int(r["bytes"]) > int(r["cache_bytes"])]
    what = f"share of the floor, {task}, contiguous float32 beyond the cache"
    if not beyond:
        return Verdict(what, f"≥ {wanted:.0%}", allocator, "not measured", None)
    shares = {r["shape"]: float(r["share_of_floor"]) for r in beyond}
    measured = ", ".join(f"{share:.0%} ({shape})" for shape, share in shares.items())
    return Verdict(what, f"each ≥ {wanted:.0%}", allocator, measured, min(shares.values()) >= wanted)


# The speedup over torch that is asked of a training step of BN + ReLU on large tensors, by layout and dtype.
_ASKED = {
    ("contiguous", "float32"): 4.5,
    ("channels-last", "float32"): 2.2,
    ("contiguous", "bfloat16"): 3.0,
    ("channels-last", "bfloat16"): 3.0,
}
SHARE_OF_FLOOR = 0.75
_MEANS = ("speedup", "attainable", "reached", "of_bound")


def limit_verdicts(rows: list[Row]) -> list[Verdict]:
    """Judge every large shape by what the machine allows: the speedup that a step at the floor would have."""
    found = limits(rows)
    verdicts = []
    for (layout, dtype), asked in _ASKED.items():
        chosen = [m for m in found if (m.layout, m.dtype) == (layout, dtype)]
        if not chosen:
            continue
        missed = [m for m in chosen if m.speedup < asked and (m.attainable >= asked or m.reached < SHARE_OF_FLOOR)]
        means = [geometric_mean(getattr(m, name) for m in chosen) for name in _MEANS]
        measured = "geometric means: {:.2f}×, {:.2f}× at the floor, {:.0%} of the floor, {:.0%} of the bound".format(
            *means
        )
        if missed:
            shapes = (f"{m.shape} ({m.speedup:.2f}× of {m.attainable:.2f}×)" for m in missed)
            measured += f"; missed by {', '.join(shapes)}"
        what = f"training step of BN + ReLU, {layout} {dtype}, in turns with the floor"
        target = f"each ≥ {asked}× if the floor allows it, otherwise ≥ {SHARE_OF_FLOOR:.0%} of the floor"
        verdicts.append(Verdict(what, target, "kept", measured, not missed))
    return verdicts


def exactness_verdicts(rows: list[Row]) -> list[Verdict]:
    """Judge the errors of y: at most torch's or float32 rounding everywhere; float32 rounding far from zero."""
    pairs: dict[tuple[str, ...], dict[str, float]] = {}
    for r in rows:
        cell = (r["shape"], r["layout"], r["dtype"], r["offset"])
        pairs.setdefault(cell, {})[r["contender"]] = float(r["error_y"])
    judged = [
        (
            "error of y against float64, every case",
            "≤ max(torch's, 2e-7 of max |y|)",
            {c: e[OURS] for c, e in pairs.items() if e[OURS] > max(e[TORCH], 2e-7)},
            {c: e[OURS] for c, e in pairs.items() if c[2] == "float32"},
        ),
        (
            "the same with the mean at 10⁴ and 10⁶ deviations, float32",
            "≤ 2e-7 of max |y|",
            {c: e[OURS] for c, e in pairs.items() if float(c[3]) and e[OURS] > 2e-7},
            {c: e[OURS] for c, e in pairs.items() if float(c[3])},
        ),
    ]
    verdicts = []
    for what, target, failed, shown in judged:
        if not shown:
            verdicts.append(Verdict(what, target, "", "not measured", None))
            continue
        cell = max(failed or shown, key=lambda c: shown.get(c, pairs[c][OURS]))
        place = f"{cell[0]} {cell[1]} {cell[2]}, mean at {float(cell[3]):g} deviations"
        verdicts.append(
            Verdict(
                what,
                target,
                "",
                f"largest {pairs[cell][OURS]:.1e} (torch {pairs[cell][TORCH]:.1e}): {place}",
                not failed,
            )
        )
    return verdicts


def memory_verdicts(rows: list[Row]) -> list[Verdict]:
    """Judge the memory that autograd keeps for BN + ReLU: x and vectors."""
    kept = {r["contender"]: float(r["kept_tensors"]) for r in select(rows, what="BN+ReLU")}
    what, target = "memory that autograd keeps for BN + ReLU", "x and [C] vectors only"
    if OURS not in kept:
        return [Verdict(what, target, "", "not measured", None)]
    measured = ", ".join(f"{name} {tensors:.2f}" for name, tensors in kept.items()) + " tensors of x's size"
    return [Verdict(what, target, "", measured, kept[OURS] < 1.01)]


def network_verdicts(rows: list[Row], allocator: str) -> list[Verdict]:
    """Judge the training step of ResNet-18."""
    verdicts = []
    for layout in cases.LAYOUTS:
        cell = {"network": "ResNet-18", "task": steps.TRAINING, "layout": layout, "precision": "float32"}
        chosen = list(select(rows, allocator=allocator, **cell))
        what, target = f"ResNet-18 training step, {layout}: share of torch's time above no BN that we save", "≥ 60 %"
        gain = steps.share_of_gain(chosen, steps.CPU) if chosen else None
        if gain is None:
            verdicts.append(Verdict(what, target, allocator, "not measured", None))
            continue
        share, low, high = gain
        measured = f"{share:.0%} (95 % interval {low:.0%} to {high:.0%}, CPU time, {len(chosen)} rounds)"
        verdicts.append(Verdict(what, target, allocator, measured, share >= 0.60))
    return verdicts
