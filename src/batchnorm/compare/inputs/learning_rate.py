"""How the learning rate changes during training."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from batchnorm.compare.errors import ComparisonError

SHAPES = {
    "constant": "constant",
    "cosine": "cosine decay to 0",
    "linear": "linear decay to 0",
    "step": "divided by 10 after 50 % and again after 75 % of the steps",
}


@dataclass(frozen=True)
class LearningRate:
    """A schedule of the learning rate.

    Attributes:
        shape: `constant`, `cosine`, `linear` or `step`.
        warmup: Number of steps over which the rate rises linearly to its full value; 0 for none.
    """

    shape: str = "constant"
    warmup: int = 0

    @classmethod
    def parse(cls, spec: str) -> LearningRate:
        """Return the schedule that `cosine` or `cosine:warmup=100` names.

        Raises:
            ComparisonError: If the name is unknown, or the warm-up is not a positive number of steps.
        """
        found = re.fullmatch(r"([a-z]+)(?::warmup=([1-9][0-9]*))?", spec) if isinstance(spec, str) else None
        if found is None or found[1] not in SHAPES:
            raise ComparisonError(
                f"schedule must be {', '.join(SHAPES)}, or one of them with a warm-up of at least 1 step, got "
                f"{spec!r}. Write for example cosine:warmup=100."
            )
        return cls(found[1], int(found[2] or 0))

    @property
    def title(self) -> str:
        """Its description after the learning rate in a sentence."""
        warmup = f", after {self.warmup} step{'s' if self.warmup > 1 else ''} of warm-up" if self.warmup else ""
        return SHAPES[self.shape] + warmup

    def check(self, steps: int) -> None:
        """Check that the warm-up ends before training does.

        Raises:
            ComparisonError: If not.
        """
        if self.warmup >= steps:
            raise ComparisonError(
                f"the warm-up must be shorter than training, {steps} steps, got {self.warmup}. Shorten it, or train "
                "for longer."
            )

    def factor(self, done: int, steps: int) -> float:
        """Return the fraction of the full learning rate for the next step.

        Args:
            done: Number of steps taken so far.
            steps: Total number of steps.
        """
        if done < self.warmup:
            return (done + 1) / self.warmup
        part = (done - self.warmup) / max(steps - self.warmup, 1)
        if self.shape == "cosine":
            return (1 + math.cos(math.pi * part)) / 2
        if self.shape == "linear":
            return 1 - part
        if self.shape == "step":
            return float(0.1 ** ((2 * done >= steps) + (4 * done >= 3 * steps)))
        return 1.0

    def scheduler(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """Return the scheduler; call its `step()` after each `step()` of the optimizer."""
        return LambdaLR(optimizer, lambda done: self.factor(min(done, steps), steps))


CONSTANT = LearningRate()
