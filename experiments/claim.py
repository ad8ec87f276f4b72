"""What the experiments share: the claim, its cells, what they measured, and the verdict.

An experiment is a file with a `Claim`, the cells to train, and how one of them is measured. `main` trains those cells
that are not there yet, on two processes with one thread each, and appends a line to `experiments/results/NAME.jsonl`
for each; then it judges, draws `docs/images/experiments/NAME.png`, and writes what was found to
`experiments/results/NAME.json`. `page.py` makes the page of the documentation from these.
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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PICTURES = ROOT / "docs" / "images" / "experiments"
CONFIDENCE = 0.95
Cell = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """A measured effect: positive (or, for ratios, above 1) where the claim says so.

    Attributes:
        what: What it is, as the beginning of a sentence.
        unit: Its unit, such as `points`; `×` for a ratio.
        worth: The smallest effect that would bear the claim out, in that unit.
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
            what: What it is.
            values: One for each seed, at least two.
            unit: Its unit; `×` for a ratio.
            worth: The smallest effect that would bear the claim out.

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

    @property
    def verdict(self) -> str:
        """`seen`, `not seen`, or `not decided here`."""
        if self.low > (1 if self.unit == "×" else 0) and self.mean >= self.worth:
            return "seen"
        return "not seen" if self.high < self.worth else "not decided here"

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
    """What somebody published, and how it is tried here.

    Attributes:
        name: Name of the file, without its ending.
        title: A few words.
        statement: What is claimed, in one sentence.
        source: Where, as Markdown with a link.
        setting: How it is tried here, in one or two sentences: network, data, steps, seeds.
    """

    name: str
    title: str
    statement: str
    source: str
    setting: str


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        seeds: How many.
        full: Whether a larger machine has hours.
        quick: Whether it is only to be seen that everything runs.
    """

    seeds: int = 5
    full: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        claim: What is tried.
        cells: Returns the parameters of each training, as JSON has them; each has a `seed`.
        measure: `measure(cell, data)` trains one, and returns what came out, as JSON has it.
        effects: Returns what the records say, the decisive effect first.
        found: Returns two to five sentences for somebody who reads only these: what was seen, with its figures.
        draw: Draws the picture.
        data: Names of the data that `measure` gets, as `batchnorm.compare.load` knows them.
        table: Returns more figures as Markdown, for `experiments/results/NAME.md`.
    """

    claim: Claim
    cells: Callable[[Size], Iterator[Cell]]
    measure: Callable[[Cell, Mapping[str, Data]], Record]
    effects: Callable[[Sequence[Record]], list[Effect]]
    found: Callable[[Sequence[Record], Sequence[Effect]], str]
    draw: Callable[[Sequence[Record]], Figure]
    data: tuple[str, ...] = ("mnist",)
    table: Callable[[Sequence[Record]], str] | None = None


def by_seed(records: Iterable[Record], value: str, **where: Any) -> list[float]:
    """Return one value of the records that are like `where`, in the order of their seeds."""
    found = [record for record in records if all(record[key] == wanted for key, wanted in where.items())]
    return [record[value] for record in sorted(found, key=lambda record: record["seed"])]


def best_rate(records: Iterable[Record], norm: str) -> float:
    """Return the learning rate with the highest mean `accuracy`, of those at which every seed's network is `alive`."""
    of_norm = [record for record in records if record["norm"] == norm]
    dead = {record["rate"] for record in of_norm if not record.get("alive", True)}
    rates = sorted({record["rate"] for record in of_norm} - dead)
    return max(rates, key=lambda rate: statistics.fmean(by_seed(of_norm, "accuracy", rate=rate)))


def read(path: Path) -> list[Record]:
    """Return the records in a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def records_of(cells: Sequence[Cell], path: Path) -> list[Record]:
    """Return the records in a file that are of these cells."""
    return [record for record in read(path) if any(cell.items() <= record.items() for cell in cells)]


def summary(experiment: Experiment, records: Sequence[Record]) -> dict[str, Any]:
    """Return what was found, as it stands in the file."""
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
    """Train what is missing, judges, and draws."""
    claim = experiment.claim
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with the official files; else they are downloaded once")
    parser.add_argument("--full", action="store_true", help="the longer form, for a larger machine")
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing (needs --out)")
    parser.add_argument("--out", type=Path, help="folder for records, summary and picture, instead of the repository's")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes, of one thread each (default: 2)")
    given = parser.parse_args()
    if given.quick and not given.out:
        parser.error("--quick needs --out: its figures must not take the place of real ones")
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
    (results / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    experiment.draw(records).savefig(pictures / f"{name}.png", dpi=110)
    print(f"{claim.title}\n{textwrap.fill(claim.statement, 100)} ({claim.source})\n")
    for effect in experiment.effects(records):
        print(effect)
    print(f"\n{textwrap.fill(found['found'], 100)}")
    if experiment.table:
        table = experiment.table(records)
        (results / f"{name}.md").write_text(table)
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
