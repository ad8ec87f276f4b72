"""The parts that all experiments share: the claim, its cells, their measurements, and the verdict.

An experiment is a file with a `Claim`, the cells to train, and the measurement of one cell. `main` trains the cells
that have no results yet, in two processes with one thread each, and appends a line for each to
`experiments/results/NAME.jsonl`. It then judges the claim, draws `docs/images/experiments/NAME.png`, and writes a
summary to `experiments/results/NAME.json`. `page.py` writes the page of the documentation from these summaries.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from scipy import stats

from batchnorm.compare import Data, load
from batchnorm.files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PICTURES = ROOT / "docs" / "images" / "experiments"
CONFIDENCE = 0.95
Cell = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """A measured effect: positive (or, for ratios, above 1) if it supports the claim.

    Attributes:
        what: Its description, as the beginning of a sentence.
        unit: Its unit, such as `points`; `×` for a ratio.
        worth: The smallest effect that would support the claim, in that unit.
        values: One for each seed.
        mean: Their mean; the geometric one for a ratio.
        low: Lower end of the 95 % interval of the mean (Student's t; on logarithms for a ratio).
        high: Its upper end.
    """

    what: str
    unit: str
    worth: float
    values: list[float]
    mean: float
    low: float
    high: float

    @classmethod
    def over(cls, what: str, values: Iterable[float], *, unit: str, worth: float) -> Effect:
        """Return the effect over the seeds.

        Args:
            what: Its description.
            values: One for each seed, at least two.
            unit: Its unit; `×` for a ratio.
            worth: The smallest effect that would support the claim.

        Raises:
            ValueError: If there are fewer than two values, or one is not finite.
        """
        found = list(values)
        if len(found) < 2 or not all(map(math.isfinite, found)):
            raise ValueError(f"{what}: an effect needs at least two finite values, got {found}. Add seeds.")
        ratio = unit == "×"
        terms = [math.log(value) for value in found] if ratio else found
        mean = statistics.fmean(terms)
        if len(set(terms)) == 1:
            low = high = mean
        else:
            low, high = stats.ttest_1samp(terms, 0).confidence_interval(CONFIDENCE)
        ends = (math.exp(end) if ratio else float(end) for end in (mean, low, high))
        return cls(what, unit, worth, found, *ends)

    @classmethod
    def ratio(cls, what: str, above: Iterable[float], below: Iterable[float], *, worth: float) -> Effect:
        """Return the effect of `above` over `below`, seed by seed."""
        return cls.over(what, (a / b for a, b in zip(above, below, strict=True)), unit="×", worth=worth)

    @classmethod
    def difference(cls, what: str, more: Iterable[float], less: Iterable[float], *, worth: float) -> Effect:
        """Return the effect of `more` minus `less` in points, seed by seed."""
        return cls.over(what, (a - b for a, b in zip(more, less, strict=True)), unit="points", worth=worth)

    @property
    def verdict(self) -> str:
        """`seen`, `smaller than claimed`, `not seen`, or `not decided here`."""
        exists = self.low > (1 if self.unit == "×" else 0)
        if exists and self.mean >= self.worth:
            return "seen"
        if self.high >= self.worth:
            return "not decided here"
        return "smaller than claimed" if exists else "not seen"

    @property
    def figures(self) -> str:
        """The mean and its interval."""
        digits = 0 if abs(self.mean) >= 1000 else 1 if abs(self.mean) >= 10 else 2
        mean, low, high = (f"{value:,.{digits}f}".replace("-", "−") for value in (self.mean, self.low, self.high))
        unit = "×" if self.unit == "×" else f" {self.unit}"
        return f"{mean}{unit} ({low} to {high})"

    def __str__(self) -> str:
        return f"{self.what}: {self.figures}; {self.verdict}"


@dataclass(frozen=True)
class Claim:
    """A published claim, and how it is tested here.

    Attributes:
        name: Name of the experiment's file, without its ending.
        title: Its title.
        statement: The claim in one sentence.
        source: The publication, as Markdown with a link.
        setting: The setting of the test, in one or two sentences: network, data, steps, seeds.
    """

    name: str
    title: str
    statement: str
    source: str
    setting: str


@dataclass(frozen=True)
class Size:
    """The size of an experiment.

    Attributes:
        seeds: Number of seeds.
        full: Whether to run the longer form, which takes hours on a larger machine.
        quick: Whether to run only a short test of the code.
    """

    seeds: int = 5
    full: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        claim: The claim.
        cells: Returns the parameters of each training as JSON values; each has a `seed`.
        measure: `measure(cell, data)` trains one cell, and returns its measurements as JSON values.
        effects: Returns the effects in the records, the decisive one first.
        found: Returns the results in two to five sentences that stand alone.
        draw: Draws the picture.
        data: Names of the data for `measure`, as in `batchnorm.compare.load`.
        table: Returns more results as Markdown, for `experiments/results/NAME.md`.
    """

    claim: Claim
    cells: Callable[[Size], Iterator[Cell]]
    measure: Callable[[Cell, Mapping[str, Data]], Record]
    effects: Callable[[Sequence[Record]], list[Effect]]
    found: Callable[[Sequence[Record], Sequence[Effect]], str]
    draw: Callable[[Sequence[Record]], Figure]
    data: tuple[str, ...] = ("mnist",)
    table: Callable[[Sequence[Record]], str] | None = None

    @classmethod
    def of(cls, claim: Claim, module: Mapping[str, Any], *, data: tuple[str, ...] = ("mnist",)) -> Experiment:
        """Return the experiment of a module that defines the functions above; `module` is its `globals()`."""
        functions = (module[name] for name in ("cells", "measure", "effects", "found", "draw"))
        return cls(claim, *functions, data=data, table=module.get("table"))


def by_seed(records: Iterable[Record], value: str, **where: Any) -> list[float]:
    """Return one value of the records that match `where`, in the order of their seeds."""
    found = [record for record in records if all(record[key] == wanted for key, wanted in where.items())]
    return [record[value] for record in sorted(found, key=lambda record: record["seed"])]


def best_rate(records: Iterable[Record], norm: str) -> float:
    """Return the learning rate with the highest mean `accuracy` among the rates at which every network is `alive`."""
    of_norm = [record for record in records if record["norm"] == norm]
    dead = {record["rate"] for record in of_norm if not record.get("alive", True)}
    rates = sorted({record["rate"] for record in of_norm} - dead)
    return max(rates, key=lambda rate: statistics.fmean(by_seed(of_norm, "accuracy", rate=rate)))


def read(path: Path) -> list[Record]:
    """Return the records in a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def records_of(cells: Sequence[Cell], path: Path) -> list[Record]:
    """Return the records of these cells in a file."""
    return [record for record in read(path) if any(cell.items() <= record.items() for cell in cells)]


def summary(experiment: Experiment, records: Sequence[Record]) -> dict[str, Any]:
    """Return the content of the summary's file."""
    effects = experiment.effects(records)
    return {
        "claim": asdict(experiment.claim),
        "verdict": effects[0].verdict,
        "effects": [{**asdict(effect), "verdict": effect.verdict} for effect in effects],
        "found": experiment.found(records, effects),
        "trainings": len(records),
        "minutes": round(sum(record["seconds"] for record in records) / 60, 1),
    }


def main(experiment: Experiment) -> None:
    """Train the missing cells, judge the claim, and draw the picture."""
    claim = experiment.claim
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with the official files, instead of downloading them")
    parser.add_argument("--full", action="store_true", help="the longer form, for a larger machine")
    parser.add_argument(
        "--quick", action="store_true", help="test that it runs; the results mean nothing (needs --out)"
    )
    parser.add_argument("--out", type=Path, help="folder for records, summary and picture, instead of the repository's")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes, of one thread each (default: 2)")
    given = parser.parse_args()
    if given.quick and not given.out:
        parser.error("--quick needs --out: its results must not replace real ones")
    size = Size(seeds=2 if given.quick else 20 if given.full else 5, full=given.full, quick=given.quick)
    results, pictures = given.out or RESULTS, given.out or PICTURES
    results.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    name = f"{claim.name}-full" if given.full else claim.name
    path = results / f"{name}.jsonl"
    cells = list(experiment.cells(size))
    _train(experiment, cells, path, given.data_dir, given.quick, given.jobs)
    records = records_of(cells, path)
    found = summary(experiment, records)
    write_whole(results / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    experiment.draw(records).savefig(pictures / f"{name}.png", dpi=110)
    print(f"{claim.title}\n{textwrap.fill(claim.statement, 100)} ({claim.source})\n")
    for effect in experiment.effects(records):
        print(effect)
    print(f"\n{textwrap.fill(found['found'], 100)}")
    if experiment.table:
        table = experiment.table(records)
        write_whole(results / f"{name}.md", table)
        print(f"\n{table}")


def _train(experiment: Experiment, cells: list[Cell], path: Path, folder: Path | None, quick: bool, jobs: int) -> None:
    records = read(path)
    missing = [cell for cell in cells if not any(cell.items() <= record.items() for record in records)]
    if not missing:
        return
    names = experiment.data
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (names, folder, quick)) as pool,
        path.open("a") as file,
    ):
        waiting = [pool.submit(_measure, experiment.measure, cell) for cell in missing]
        try:
            for done in track(
                as_completed(waiting), experiment.claim.name, len(waiting), disable=not sys.stderr.isatty()
            ):
                file.write(json.dumps(done.result(), allow_nan=False) + "\n")
                file.flush()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_DATA: dict[str, Data] = {}


def _begin(names: tuple[str, ...], folder: Path | None, quick: bool) -> None:
    torch.set_num_threads(1)
    for name in names:
        _DATA[name] = load("mnist-mini") if quick else load(name, data_dir=folder)


def _measure(measure: Callable[[Cell, Mapping[str, Data]], Record], cell: Cell) -> Record:
    torch.manual_seed(cell["seed"])
    begin = time.perf_counter()
    found = measure(cell, _DATA)
    seconds = time.perf_counter() - begin
    return {**cell, **found, "seconds": round(seconds, 2), "torch": torch.__version__, "machine": platform.machine()}
