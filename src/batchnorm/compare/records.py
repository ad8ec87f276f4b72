"""What a run leaves behind: records in memory, and the same records as lines of JSON on disk.

A run's file carries the suffix `.partial` until its last line stands; every other file is written under
another name and renamed when it is whole. So a file under its final name is never a half-written one.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from batchnorm.compare.errors import ComparisonError

SETTINGS, SUMMARY, REPORT, RUNS, PARTIAL = "settings.json", "summary.json", "report.html", "runs", ".partial"


@dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes:
        step: Steps taken, this one included.
        train_seconds: Time spent in training steps so far.
        loss: Training loss of this step's batch, before the step; None if it was not finite.
    """

    step: int
    train_seconds: float
    loss: float | None


@dataclass(frozen=True)
class Evaluation:
    """One look at the whole test set, in evaluation mode.

    Attributes:
        step: Steps taken before it.
        train_seconds: Time spent in training steps so far; evaluations do not count.
        test_loss: Mean cross-entropy in nats; None if it was not finite.
        test_accuracy: Share of samples classified rightly, 0 to 1.
    """

    step: int
    train_seconds: float
    test_loss: float | None
    test_accuracy: float


@dataclass(frozen=True)
class Histogram:
    """What went into the first activation in one step of training: all units and samples of its batch.

    Attributes:
        step: The step, counted from 1; its forward pass has the weights after `step - 1` updates.
        low: Left edge of the first bin.
        high: Right edge of the last bin; all bins are equally wide.
        counts: Number of values in each bin.
        nonfinite: Number of values that were NaN or infinite.
        percentiles: The 15th, 50th and 85th percentile (None if no value was finite).
    """

    step: int
    low: float
    high: float
    counts: list[int]
    nonfinite: int
    percentiles: list[float] | None


@dataclass(frozen=True)
class Layer:
    """One normalization layer after training, channel by channel; what a layer does not have is None.

    Attributes:
        name: Its path in the network.
        kind: Its class.
        weight: γ.
        bias: β.
        running_mean: Running mean.
        running_var: Running variance.
    """

    name: str
    kind: str
    weight: list[float | None] | None
    bias: list[float | None] | None
    running_mean: list[float | None] | None
    running_var: list[float | None] | None


@dataclass
class Run:
    """One network trained with one normalization from one seed.

    Attributes:
        norm: The normalization, as the user wrote it.
        seed: Seed of the initial values and of the data order.
        parameters: Number of trainable values.
        watched: What the histograms show, in words; None if the network gives nothing to watch.
        shared: Names of the parameters whose initial values the first norm's network had too.
        own: Names of the other parameters.
        steps: Each step of training.
        evaluations: Each look at the test set; the first is before training.
        histograms: Distributions of the input to the first activation.
        layers: The normalization layers after training.
        diverged_at: The step whose loss was not finite, where training was given up; None if there was none.
    """

    norm: str
    seed: int
    parameters: int
    watched: str | None
    shared: list[str]
    own: list[str]
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    diverged_at: int | None = None

    @property
    def file_name(self) -> str:
        """Name of the run's file in `runs/`."""
        return f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', self.norm)}-seed{self.seed}.jsonl"

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Returns the run in a finished file.

        Args:
            path: A file in `runs/`.

        Raises:
            ValueError: If the file breaks off before the run's last line.
        """
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if not lines or lines[0].pop("record") != "run" or lines[-1].pop("record") != "end":
            raise ValueError(
                f"a finished run begins with a run record and ends with an end record, got {path}. Run again."
            )
        run = cls(**lines[0])
        run.diverged_at = lines[-1]["diverged_at"]
        for line in lines[1:-1]:
            record = line.pop("record")
            {
                "step": lambda line: run.steps.append(Step(**line)),
                "evaluation": lambda line: run.evaluations.append(Evaluation(**line)),
                "histogram": lambda line: run.histograms.append(Histogram(**line)),
                "layer": lambda line: run.layers.append(Layer(**line)),
            }[record](line)
        return run


class Recorder:
    """Adds records to a run and, at the same time, to its file, flushed at each evaluation."""

    def __init__(self, run: Run, file: IO[str]) -> None:
        self.run = run
        self._file = file
        head = ("norm", "seed", "parameters", "watched", "shared", "own")
        self._write("run", {name: getattr(run, name) for name in head})

    def step(self, record: Step) -> None:
        """Records one step of training."""
        self.run.steps.append(record)
        self._write("step", asdict(record))

    def evaluation(self, record: Evaluation) -> None:
        """Records one evaluation, and lets the file have all that was recorded so far."""
        self.run.evaluations.append(record)
        self._write("evaluation", asdict(record))
        self._file.flush()

    def histogram(self, record: Histogram) -> None:
        """Records one distribution."""
        self.run.histograms.append(record)
        self._write("histogram", asdict(record))

    def end(self, layers: list[Layer], diverged_at: int | None) -> None:
        """Records the layers after training, and the line that makes the file whole."""
        self.run.layers, self.run.diverged_at = layers, diverged_at
        for layer in layers:
            self._write("layer", asdict(layer))
        self._write("end", {"diverged_at": diverged_at})

    def _write(self, record: str, content: dict[str, Any]) -> None:
        self._file.write(json.dumps({"record": record, **content}, allow_nan=False) + "\n")


@contextmanager
def recording(run: Run, directory: Path) -> Iterator[Recorder]:
    """Opens the run's file; it takes its final name when the block ends without an exception."""
    path = directory / RUNS / run.file_name
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        yield Recorder(run, file)
    partial.replace(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that appears under its name only when it is whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that appears under its name only when it is whole."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def prepare_directory(directory: Path, figures: list[str], overwrite: bool) -> None:
    """Makes a directory ready for a new comparison.

    Args:
        directory: Made if it is not there.
        figures: Names of the pictures that the comparison will write.
        overwrite: Whether the files of an earlier comparison in it are removed; other files stay.

    Raises:
        ComparisonError: If it holds an earlier comparison and `overwrite` is False.
        OSError: If it cannot be made or written to.
    """
    (directory / RUNS).mkdir(parents=True, exist_ok=True)
    ours = [directory / name for name in (SUMMARY, REPORT, SETTINGS, *figures)]
    ours += [*(directory / RUNS).glob("*.jsonl"), *(directory / RUNS).glob(f"*.jsonl{PARTIAL}")]
    found = [path for path in ours if path.exists()]
    if found and not overwrite:
        raise ComparisonError(
            f"out must not hold an earlier comparison, but {directory} has {found[0].name}. Choose another "
            "directory, or replace what is there with overwrite (--overwrite)."
        )
    for path in found:
        path.unlink()


def finite(value: float) -> float | None:
    """Returns the value, or None if it is NaN or infinite, which JSON cannot hold."""
    return float(value) if math.isfinite(value) else None
