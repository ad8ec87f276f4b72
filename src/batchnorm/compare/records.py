"""What a run leaves behind: records in memory, and the same records as lines of JSON on disk."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from batchnorm.compare.inputs.choices import Choice


@dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes:
        step: Steps taken, this one included.
        train_seconds: Time spent in training steps so far.
        loss: Training loss of this step's batch, before the step; None if it was not finite.
        gradient_norm: ℓ2 norm of that loss's gradient over all parameters, in the first step and where the test set is
            looked at; None elsewhere, and where it was not finite.
    """

    step: int
    train_seconds: float
    loss: float | None
    gradient_norm: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One look at the whole test set, and at as much of the training set, in evaluation mode.

    Attributes:
        step: Steps taken before it.
        train_seconds: Time spent in training steps so far; evaluations do not count.
        test_loss: Mean cross-entropy in nats; None if it was not finite.
        test_accuracy: Share of samples classified rightly, 0 to 1.
        train_loss: As `test_loss`, of a part of the training set that is the same in all runs, at most as many samples
            as the test set has.
        train_accuracy: As `test_accuracy`, of that part.
    """

    step: int
    train_seconds: float
    test_loss: float | None
    test_accuracy: float
    train_loss: float | None = None
    train_accuracy: float | None = None


@dataclass(frozen=True)
class Histogram:
    """What went into one activation in one step of training: all units and samples of its batch.

    Attributes:
        step: The step, counted from 1; its forward pass has the weights after `step - 1` updates.
        low: Left edge of the first bin.
        high: Right edge of the last bin; all bins are equally wide.
        counts: Number of values in each bin.
        nonfinite: Number of values that were NaN or infinite.
        percentiles: The 15th, 50th and 85th percentile (None if no value was finite).
        where: Which activation: the `first` or the `last` that the network calls.
    """

    step: int
    low: float
    high: float
    counts: list[int]
    nonfinite: int
    percentiles: list[float] | None
    where: str = "first"


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
    """One network trained with one choice from one seed.

    Attributes:
        choice: What it was trained with.
        seed: Seed of the initial values and of the data order.
        parameters: Number of trainable values.
        watched: What the histograms show, in words, by their `where`.
        shared: Names of the parameters whose initial values the first choice's network had too.
        own: Names of the other parameters.
        kept_bytes: What the backward pass of one training step finds kept; None if that is not known.
        environment: Machine, versions, threads and processes that trained it.
        steps: Each step of training.
        evaluations: Each look at the test set; the first is before training.
        histograms: Distributions of the inputs to the watched activations.
        layers: The normalization layers after training.
        diverged_at: The step whose loss was not finite, where training was given up; None if there was none.
    """

    choice: Choice
    seed: int
    parameters: int = 0
    watched: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    kept_bytes: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    diverged_at: int | None = None

    @property
    def norm(self) -> str:
        """The normalization, as the user wrote it."""
        return self.choice.norm

    @property
    def file_name(self) -> str:
        """Name of the run's file in `runs/`."""
        return f"{self.choice.file_stem}-seed{self.seed}.jsonl"

    @property
    def head(self) -> dict[str, Any]:
        """What is known before training."""
        names = ("choice", "seed", "parameters", "watched", "shared", "own", "kept_bytes", "environment")
        return {name: getattr(self, name) for name in names} | {"choice": asdict(self.choice)}

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
        run = cls(**{**lines[0], "choice": Choice(**lines[0]["choice"])})
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


class Listener(Protocol):
    """Is told each record as it comes."""

    def step(self, record: Step) -> None:
        """A step of training was taken."""

    def evaluation(self, record: Evaluation) -> None:
        """The test set was looked at."""

    def histogram(self, record: Histogram) -> None:
        """A distribution was taken."""


class Recorder:
    """Adds records to a run and, at the same time, to its file, flushed at each evaluation; tells others, too."""

    def __init__(self, run: Run, file: IO[str], *listeners: Listener) -> None:
        self.run = run
        self._file = file
        self._listeners = listeners
        self._write("run", run.head)

    def step(self, record: Step) -> None:
        """Records one step of training."""
        self.run.steps.append(record)
        self._write("step", asdict(record))
        for listener in self._listeners:
            listener.step(record)

    def evaluation(self, record: Evaluation) -> None:
        """Records one evaluation, and lets the file have all that was recorded so far."""
        self.run.evaluations.append(record)
        self._write("evaluation", asdict(record))
        self._file.flush()
        for listener in self._listeners:
            listener.evaluation(record)

    def histogram(self, record: Histogram) -> None:
        """Records one distribution."""
        self.run.histograms.append(record)
        self._write("histogram", asdict(record))
        for listener in self._listeners:
            listener.histogram(record)

    def end(self, layers: list[Layer], diverged_at: int | None) -> None:
        """Records the layers after training, and the line that makes the file whole."""
        self.run.layers, self.run.diverged_at = layers, diverged_at
        for layer in layers:
            self._write("layer", asdict(layer))
        self._write("end", {"diverged_at": diverged_at})

    def _write(self, record: str, content: dict[str, Any]) -> None:
        self._file.write(json.dumps({"record": record, **content}, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """Returns the value, or None if it is NaN or infinite, which JSON cannot hold."""
    return float(value) if math.isfinite(value) else None
