"""How the learning rate changes through training."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from batchnorm.compare.errors import ComparisonError

SHAPES = {
    "constant": "constant",
    "cosine": "falling to 0 along a cosine",
    "linear": "falling to 0 in a straight line",
    "step": "divided by 10 after 50 % and again after 75 % of the steps",
}


@dataclass(frozen=True)
class LearningRate:
    """A course of the learning rate.

    Attributes:
        shape: `constant`, `cosine`, `linear` or `step`.
        warmup: Steps in which it rises to its full height, in equal parts; 0 for none.
    """

    shape: str = "constant"
    warmup: int = 0

    @classmethod
    def parse(cls, spec: str) -> LearningRate:
        """Returns what `cosine` or `cosine:warmup=100` stands for.

        Raises:
            ComparisonError: If it is neither one of the names, nor one with a warm-up of a whole number of steps.
        """
        found = re.fullmatch(r"([a-z]+)(?::warmup=([1-9][0-9]*))?", spec) if isinstance(spec, str) else None
        if found is None or found[1] not in SHAPES:
            raise ComparisonError(
                f"schedule must be {', '.join(SHAPES)}, or one of them with a warm-up of a whole number of steps from "
                f"1, got {spec!r}. Write for example cosine:warmup=100."
            )
        return cls(found[1], int(found[2] or 0))

    @property
    def title(self) -> str:
        """What it is called behind the learning rate in a sentence."""
        rising = f", after {self.warmup} step{'s' if self.warmup > 1 else ''} of warm-up" if self.warmup else ""
        return SHAPES[self.shape] + rising

    def check(self, steps: int) -> None:
        """Checks that the warm-up ends before the training does.

        Raises:
            ComparisonError: If not.
        """
        if self.warmup >= steps:
            raise ComparisonError(
                f"the warm-up must be shorter than the training, {steps} steps, got {self.warmup}. Shorten it, or "
                "train for longer."
            )

    def factor(self, done: int, steps: int) -> float:
        """Returns the part of the full learning rate that the next step takes.

        Args:
            done: Steps taken so far.
            steps: Steps in all.
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
        """Returns what sets the optimizer's learning rate; its `step()` belongs behind each of the optimizer's."""
        return LambdaLR(optimizer, lambda done: self.factor(min(done, steps), steps))


CONSTANT = LearningRate()
