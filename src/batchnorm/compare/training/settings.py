"""What is asked for, checked and with its defaults filled in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch

from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.choices import Choice, Grid
from batchnorm.compare.training.training import OPTIMIZERS

T = TypeVar("T")
EPOCHS = 10
EVALUATIONS = 80
CLOSEST = 5  # steps between looks, which cost more than steps do
SEVERAL = {"norms": "norm"} | {name: name for name in ("placement", "lr", "batch_size", "sampling")}


@dataclass(frozen=True)
class Settings:
    """What was asked for, with every default filled in.

    Attributes:
        grid: The normalizations, the others being compared with the first, and all else that has several values.
        model: Name of the network.
        input_norm: Whether a normalization without scale and shift stands before the first layer, instead of
            standardized data.
        data: Name or path of the data.
        data_dir: Folder with the data's files, where one was given.
        epochs: Passes over the data, from which the steps of each batch size follow; None where `steps` is given.
        steps: Training steps of each run; None where `epochs` is given.
        schedule: How the learning rate changes through training.
        optimizer: Name of the optimizer.
        seeds: Number of seeds, counted from 0.
        target_accuracy: The test accuracy to reach, 0 to 1.
        evaluate_every: Steps from one look at the test set to the next; None for about 80 looks, 5 steps apart or more.
        threads: Threads that torch computed with.
        device: Where the networks were trained.
    """

    grid: Grid
    model: str
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
        """Checks what no other part checks."""
        check_target(self.target_accuracy)

    @classmethod
    def read(cls, content: dict[str, Any]) -> Settings:
        """Returns the settings that JSON has kept."""
        grid = {name: tuple(values) for name, values in content["grid"].items()}
        return cls(**{**content, "grid": Grid(**grid)})

    @property
    def arguments(self) -> dict[str, Any]:
        """These settings as arguments of `batchnorm.compare.run`."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "grid"}
        return found | {name: getattr(self.grid, field) for name, field in SEVERAL.items()}

    @property
    def deciding(self) -> dict[str, Any]:
        """What the result of one choice and seed depends on, besides these and the data."""
        names = ("model", "input_norm", "epochs", "steps", "schedule", "optimizer", "evaluate_every")
        found = {name: value for name, value in asdict(self).items() if name in names}
        # The others get their initial values from the first.
        return found | {"first of norms": self.grid.norm[0], "first of placement": self.grid.placement[0]}

    def steps_of(self, choice: Choice, samples: int) -> int:
        """Returns how many steps each run of a choice trains, with so many training samples."""
        return self.steps or (self.epochs or EPOCHS) * (samples // choice.batch_size)

    def interval_of(self, choice: Choice, samples: int) -> int:
        """Returns the steps from one look of a choice's run at the test set to the next."""
        return self.evaluate_every or max(CLOSEST, math.ceil(self.steps_of(choice, samples) / EVALUATIONS))


def several(name: str, given: T | Iterable[T]) -> tuple[T, ...]:
    """Returns one value, or each of several, as a tuple; a string is divided at commas.

    Raises:
        ComparisonError: If there is none, or one is there twice.
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
            raise ComparisonError(f"each value must stand once in {name}, got {value!r} twice. Leave one out.")
    return values


def check_counts(**counts: int | None) -> None:
    """Checks that each number that is given is a whole one from 1.

    Raises:
        ComparisonError: If one is not.
    """
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ComparisonError(f"{name} must be a whole number from 1, got {count!r}. Choose a positive one.")


def check_length(samples: int, batch_sizes: Iterable[int], epochs: int | None, steps: int | None) -> None:
    """Checks how long is to be trained, and with how many samples at once.

    Args:
        samples: Number of training samples.
        batch_sizes: Samples in each step; an epoch ends where less than a batch is left.
        epochs: Passes over the data.
        steps: Number of steps, instead of `epochs`.

    Raises:
        ComparisonError: If both are given, one is not positive, or a batch is larger than the data.
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


def check_target(accuracy: float) -> None:
    """Checks the test accuracy to reach.

    Raises:
        ComparisonError: If it is not a share.
    """
    if not 0 < accuracy <= 1:
        raise ComparisonError(f"target_accuracy must be above 0 and at most 1, got {accuracy!r}. Write 0.95 for 95 %.")


def learning_rates(optimizer: str, lr: float | Iterable[float] | None) -> tuple[float, ...]:
    """Returns the learning rates, the optimizer's own where none is given.

    Raises:
        ComparisonError: If there is no such optimizer, or a rate is not positive.
    """
    if optimizer not in OPTIMIZERS:
        raise ComparisonError(f"optimizer must be among {', '.join(OPTIMIZERS)}, got {optimizer!r}. Choose from these.")
    usual = OPTIMIZERS[optimizer].lr
    if lr is None:
        return (usual,)
    rates = several("lr", lr)
    for rate in rates:
        if not (rate > 0 and math.isfinite(rate)):
            raise ComparisonError(
                f"lr must be above 0 and finite, got {rate!r}. The usual one for {optimizer} is {usual}."
            )
    return tuple(float(rate) for rate in rates)


def check_device(device: str) -> torch.device:
    """Returns the device of that name.

    Raises:
        ComparisonError: If torch knows no such device, or this machine has none.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ComparisonError(
            f"device must be one that this machine has, such as cpu or cuda:0, got {device!r} ({said}). Choose cpu."
        ) from error
    return found
