"""The records of a run: in memory, and as lines of JSON on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from batchnorm.compare.inputs.choices import Choice


@dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes:
        step: Number of steps taken, including this one.
        train_seconds: Time spent in training steps so far.
        loss: Training loss of this step's batch, before the step; None if it was not finite.
        gradient_norm: ℓ2 norm of that loss's gradient over all parameters, in the first step and in each step followed
            by an evaluation; None in other steps, and if it was not finite.
    """

    step: int
    train_seconds: float
    loss: float | None
    gradient_norm: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the whole test set, and of as many training samples, in evaluation mode.

    Attributes:
        step: Number of training steps taken before it.
        train_seconds: Time spent in training steps so far; evaluations do not count.
        test_loss: Mean cross-entropy in nats; None if it was not finite.
        test_accuracy: Share of correctly classified samples, 0 to 1.
        train_loss: Mean cross-entropy on a subset of the training set. All runs use the same subset, at most as large
            as the test set.
        train_accuracy: Accuracy on that subset.
    """

    step: int
    train_seconds: float
    test_loss: float | None
    test_accuracy: float
    train_loss: float | None = None
    train_accuracy: float | None = None


@dataclass(frozen=True)
class Histogram:
    """The distribution of one activation's input in one training step, over all units and samples of the batch.

    Attributes:
        step: The step, counted from 1; its forward pass uses the weights after `step - 1` updates.
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
class Distribution:
    """The distribution of the values at one place of the network after training, in evaluation mode.

    All runs use the same training samples. The histogram is over all units and samples.

    Attributes:
        site: The number of the normalization or, without one, of the activation, in the order of their calls, from 0.
        layer: Its path in the network, with the number of the call if there are several.
        stage: `input` of the normalization, `normalized` for its output, or `activated` for the output of its
            activation. At an activation without normalization, `input` and `normalized` are the same values.
        low: Left edge of the first bin.
        high: Right edge of the last bin; all bins are equally wide.
        counts: Number of values in each bin.
        nonfinite: Number of values that were NaN or infinite.
        percentiles: The 15th, 50th and 85th percentile (None if no value was finite).
    """

    site: int
    layer: str
    stage: str
    low: float
    high: float
    counts: list[int]
    nonfinite: int
    percentiles: list[float] | None


@dataclass(frozen=True)
class Layer:
    """One normalization layer after training, channel by channel; None for each tensor that the layer lacks.

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
        choice: The combination of settings it was trained with.
        seed: Seed of the initial values and the data order.
        parameters: Number of trainable values.
        watched: Descriptions of the histograms, by their `where`.
        shared: Names of the parameters that start with the values of the first choice's network.
        own: Names of the other parameters.
        kept_bytes: Memory that one training step keeps for its backward pass; None if unknown.
        environment: Machine, versions, and numbers of threads and processes.
        steps: Each step of training.
        evaluations: Each evaluation; the first is before training.
        histograms: Distributions of the inputs to the watched activations.
        distributions: Distributions at every normalization and activation after training.
        layers: The normalization layers after training.
        diverged_at: The step at which training stopped because its loss was not finite; None if it did not diverge.
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
    distributions: list[Distribution] = field(default_factory=list)
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
        """The facts that are known before training starts."""
        names = ("choice", "seed", "parameters", "watched", "shared", "own", "kept_bytes", "environment")
        return {name: getattr(self, name) for name in names} | {"choice": asdict(self.choice)}

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Return the run that a finished file holds.

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
        run = cls(**{**lines[0], "choice": Choice(**lines[0]["choice"]), **lines[-1]})
        for line in lines[1:-1]:
            run.add(_KINDS[line.pop("record")](**line))
        return run

    def add(self, record: Record) -> str:
        """Append a record to the list of its kind; return the kind's name in the run's file."""
        kind = type(record).__name__.lower()
        getattr(self, f"{kind}s").append(record)
        return kind


Record = Step | Evaluation | Histogram | Distribution | Layer
_KINDS: dict[str, type[Record]] = {
    kind.__name__.lower(): kind for kind in (Step, Evaluation, Histogram, Distribution, Layer)
}


class Recorder:
    """Add records to a run and to its file, and pass them on.

    The file is flushed at each evaluation.

    Args:
        run: The run that the records belong to.
        file: The run's file, open for writing.
        *listeners: Each is called with every record.
    """

    def __init__(self, run: Run, file: IO[str], *listeners: Callable[[Record], None]) -> None:
        self.run = run
        self._file = file
        self._listeners = listeners
        self._write("run", run.head)

    def add(self, record: Record) -> None:
        """Add one record."""
        self._write(self.run.add(record), asdict(record))
        if isinstance(record, Evaluation):
            self._file.flush()
        for listener in self._listeners:
            listener(record)

    def end(self, records: Iterable[Distribution | Layer], diverged_at: int | None) -> None:
        """Add the records after training, then the line that marks the file as complete."""
        for record in records:
            self.add(record)
        self.run.diverged_at = diverged_at
        self._write("end", {"diverged_at": diverged_at})

    def _write(self, record: str, content: dict[str, Any]) -> None:
        self._file.write(json.dumps({"record": record, **content}, allow_nan=False) + "\n")


def finite(value: float) -> float | None:
    """Return the value, or None if it is NaN or infinite, which JSON cannot hold."""
    return float(value) if math.isfinite(value) else None
