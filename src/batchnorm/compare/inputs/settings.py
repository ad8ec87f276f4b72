"""The settings of a comparison: checked, with every default filled in."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from batchnorm._options import as_clause
from batchnorm.compare.errors import ComparisonError, check_among
from batchnorm.compare.inputs.choices import Choice, Grid
from batchnorm.compare.inputs.optimizers import OPTIMIZERS

T = TypeVar("T")
EPOCHS = 10
EVALUATIONS = 80
CLOSEST = 5  # fewest steps between evaluations by default, because an evaluation costs more than a step
# More threads than processors are slower, and thousands of threads end the process.
_MOST = {"seeds": 10_000, "threads": max(256, os.cpu_count() or 1)}
# The field of `Grid` that each argument with several values fills.
SEVERAL = {"norms": "norm"} | {name: name for name in ("model", "placement", "lr", "batch_size", "sampling", "dropout")}

FIRST = ("model", "norms", "placement")  # arguments that decide the network of the first choice


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison, with every default filled in.

    Attributes:
        grid: The settings that can have several values. The other networks and norms are compared with the first.
        input_norm: Whether a layer without scale and shift normalizes the inputs, instead of standardized data.
        data: Name or path of the data.
        data_dir: Folder with the data's files; None if not given.
        epochs: Epochs of each run, which determine its number of steps; None if `steps` is given.
        steps: Training steps of each run; None if `epochs` is given.
        schedule: How the learning rate changes during training.
        optimizer: Name of the optimizer.
        seeds: Number of seeds, counted from 0.
        target_accuracy: The test accuracy to reach, 0 to 1.
        evaluate_every: Steps from one evaluation to the next; None for about 80 evaluations, at least 5 steps apart.
        threads: Number of threads that torch uses.
        device: Device that the networks train on.
    """

    grid: Grid
    input_norm: bool
    data: str
    data_dir: str | None
    epochs: int | None
    steps: int | None
    schedule: str
    optimizer: str
    seeds: int
    target_accuracy: float
    evaluate_every: int | None
    threads: int
    device: str

    def __post_init__(self) -> None:
        """Check the target accuracy; other code checks the other arguments when it uses them."""
        if not 0 < self.target_accuracy <= 1:
            raise ComparisonError(
                f"target_accuracy must be above 0 and at most 1, got {self.target_accuracy!r}. Write 0.95 for 95 %."
            )

    @classmethod
    def read(cls, content: dict[str, Any]) -> Settings:
        """Return the settings from the result of `asdict`."""
        grid = {name: tuple(values) for name, values in content["grid"].items()}
        return cls(**{**content, "grid": Grid(**grid)})

    @property
    def arguments(self) -> dict[str, Any]:
        """These settings as arguments of `batchnorm.compare.run`."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "grid"}
        return found | {name: getattr(self.grid, field) for name, field in SEVERAL.items()}

    @property
    def deciding(self) -> dict[str, Any]:
        """Every setting that decides the result of a run, except its choice, its seed and the data."""
        names = ("input_norm", "epochs", "steps", "schedule", "optimizer", "evaluate_every")
        found = {name: getattr(self, name) for name in names}
        # All networks take their initial values from the first choice's.
        return found | {f"first of {name}": getattr(self.grid, SEVERAL[name])[0] for name in FIRST}

    def steps_of(self, choice: Choice, samples: int) -> int:
        """Return the number of training steps in each run of a choice, given the number of training samples."""
        return self.steps or (self.epochs or EPOCHS) * (samples // choice.batch_size)

    def interval_of(self, choice: Choice, samples: int) -> int:
        """Return the number of steps between evaluations in each run of a choice."""
        return self.evaluate_every or max(CLOSEST, math.ceil(self.steps_of(choice, samples) / EVALUATIONS))


def several(name: str, given: T | Iterable[T]) -> tuple[T, ...]:
    """Return one value or several as a tuple; a string is split at commas.

    Raises:
        ComparisonError: If there is no value, or a value is repeated.
    """
    values: tuple[Any, ...]
    if isinstance(given, str):
        values = tuple(part.strip() for part in given.split(",") if part.strip())
    elif isinstance(given, Iterable):
        values = tuple(given)
    else:
        values = (given,)
    if not values:
        raise ComparisonError(f"{name} must have at least one value, got none. Name one.")
    for value in values:
        if values.count(value) > 1:
            raise ComparisonError(f"the values of {name} must all differ, got {value!r} twice. Leave one out.")
    return values


def check_counts(**counts: int | None) -> None:
    """Check that each count is None, or a positive integer that is not too large.

    Raises:
        ComparisonError: If one is not.
    """
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ComparisonError(f"{name} must be a positive integer, got {count!r}. Choose 1 or more.")
        if count is not None and count > _MOST.get(name, math.inf):
            raise ComparisonError(f"{name} must be at most {_MOST[name]}, got {count}. Choose a smaller number.")


def check_length(samples: int, batch_sizes: Iterable[int], epochs: int | None, steps: int | None) -> None:
    """Check the length of training and the batch sizes.

    Args:
        samples: Number of training samples.
        batch_sizes: Samples in each step; an epoch leaves out the samples that do not fill a batch.
        epochs: Number of epochs.
        steps: Number of steps, instead of `epochs`.

    Raises:
        ComparisonError: If both `epochs` and `steps` are given, a number is not positive, or a batch is larger than
            the data.
    """
    check_counts(epochs=epochs, steps=steps)
    if epochs is not None and steps is not None:
        raise ComparisonError(f"only one of epochs and steps can be given, got {epochs} and {steps}. Leave one out.")
    for batch_size in batch_sizes:
        check_counts(batch_size=batch_size)
        if batch_size > samples:
            raise ComparisonError(
                f"batch_size must be at most the number of training samples, {samples}, got {batch_size}. Choose a "
                "smaller one."
            )


def learning_rates(optimizer: str, lr: float | Iterable[float] | None) -> tuple[float, ...]:
    """Return the learning rates, or the optimizer's default if none is given.

    Raises:
        ComparisonError: If there is no such optimizer, or a rate is not positive.
    """
    check_among("optimizer", optimizer, OPTIMIZERS)
    default = OPTIMIZERS[optimizer].lr
    if lr is None:
        return (default,)
    rates = several("lr", lr)
    for rate in rates:
        if not (rate > 0 and math.isfinite(rate)):
            raise ComparisonError(
                f"lr must be above 0 and finite, got {rate!r}. The default for {optimizer} is {default}."
            )
    return tuple(float(rate) for rate in rates)


def probabilities(dropout: float | Iterable[float | None] | None) -> tuple[float | None, ...]:
    """Return the probabilities of dropout, or None alone for networks with their own.

    Raises:
        ComparisonError: If one is not a probability below 1.
    """
    values = several("dropout", dropout)
    if values == (None,):
        return (None,)
    for value in values:
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ComparisonError(
                f"dropout must be probabilities from 0 to below 1, got {value!r}. Write for example 0.5."
            )
    return tuple(float(value) for value in values if value is not None)


def check_device(device: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ComparisonError: If torch knows no such device, or this machine has none.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ComparisonError(
            f"device must be one that this machine has, such as cpu or cuda:0, got {device!r} ({as_clause(error)}). "
            "Choose cpu."
        ) from error
    return found
