"""What is asked for, checked and with its defaults filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.training import OPTIMIZERS

EPOCHS = 10
EVALUATIONS = 80


@dataclass(frozen=True)
class Settings:
    """What was asked for, with every default filled in.

    Attributes:
        norms: The normalizations; the others are compared with the first.
        model: Name of the network.
        data: Name of the data.
        batch_size: Samples in each training step.
        sampling: How batches are drawn, `iid` or `classes:2`.
        steps: Training steps of each run.
        lr: Learning rate, constant.
        optimizer: Name of the optimizer.
        seeds: Number of seeds, counted from 0.
        target_accuracy: The test accuracy to reach, 0 to 1.
        threads: Threads that torch computed with.
        evaluate_every: Steps from one look at the test set to the next.
    """

    norms: tuple[str, ...]
    model: str
    data: str
    batch_size: int
    sampling: str
    steps: int
    lr: float
    optimizer: str
    seeds: int
    target_accuracy: float
    threads: int
    evaluate_every: int

    def __post_init__(self) -> None:
        """Checks what no other part checks."""
        if not 0 < self.target_accuracy <= 1:
            raise ComparisonError(
                f"target_accuracy must be above 0 and at most 1, got {self.target_accuracy!r}. Write 0.95 for 95 %."
            )


def check_counts(**counts: int | None) -> None:
    """Checks that each number that is given is a whole one from 1.

    Raises:
        ComparisonError: If one is not.
    """
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ComparisonError(f"{name} must be a whole number from 1, got {count!r}. Choose a positive one.")


def training_steps(samples: int, batch_size: int, epochs: int | None, steps: int | None) -> int:
    """Returns how many steps to train.

    Args:
        samples: Number of training samples.
        batch_size: Samples in each step; an epoch ends where less than a batch is left.
        epochs: Passes over the data; 10 where neither this nor `steps` is given.
        steps: Number of steps, instead of `epochs`.

    Raises:
        ComparisonError: If both are given, one is not positive, or a batch is larger than the data.
    """
    check_counts(batch_size=batch_size, epochs=epochs, steps=steps)
    if epochs is not None and steps is not None:
        raise ComparisonError(f"only one of epochs and steps can be given, got {epochs} and {steps}. Leave one out.")
    if batch_size > samples:
        raise ComparisonError(
            f"batch_size must be at most the number of training samples, {samples}, got {batch_size}. Choose a "
            "smaller one."
        )
    return steps or (epochs or EPOCHS) * (samples // batch_size)


def evaluation_interval(steps: int, evaluate_every: int | None) -> int:
    """Returns the steps from one look at the test set to the next; where none is given, for about 80 looks.

    Raises:
        ComparisonError: If it is not positive.
    """
    check_counts(evaluate_every=evaluate_every)
    return evaluate_every or math.ceil(steps / EVALUATIONS)


def learning_rate(optimizer: str, lr: float | None) -> float:
    """Returns the learning rate, the optimizer's own where none is given.

    Raises:
        ComparisonError: If there is no such optimizer, or the rate is not positive.
    """
    if optimizer not in OPTIMIZERS:
        raise ComparisonError(f"optimizer must be among {', '.join(OPTIMIZERS)}, got {optimizer!r}. Choose from these.")
    if lr is None:
        return OPTIMIZERS[optimizer].lr
    if not (lr > 0 and math.isfinite(lr)):
        raise ComparisonError(
            f"lr must be above 0 and finite, got {lr!r}. The usual one for {optimizer} is {OPTIMIZERS[optimizer].lr}."
        )
    return float(lr)
