"""What a difference between two ways of normalizing the same batches does to the result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.doctor.finding import Severity

# Above note only where both the result changes by so much of its spread over the samples, and the loss by so much of
# itself: a loss near zero grows by large factors that mean nothing, and results change in ways that cost nothing.
OUTPUT_MATTERS, OUTPUT_SEVERE = 0.1, 0.3
LOSS_MATTERS, LOSS_SEVERE = 0.1, 0.5
# Without a loss nobody knows what a change costs: it has to be large, and is no error.
OUTPUT_MATTERS_ALONE = 0.4


@dataclass(frozen=True)
class Outcome:
    """What one pass over the batches gave.

    Attributes:
        outputs: Of each batch, the first floating-point tensor that the model returned: `[N, K]` as it was, all else
            as `[N, features, 1]`.
        losses: Of each batch; empty without a loss.
    """

    outputs: list[Tensor]
    losses: list[float]

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the outputs."""
        return [y.shape for y in self.outputs]

    @property
    def loss(self) -> float | None:
        """The mean over the batches."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    @property
    def finite(self) -> bool:
        """Whether every result is."""
        return all(bool(y.isfinite().all()) for y in self.outputs) and all(map(math.isfinite, self.losses))


@dataclass(frozen=True)
class Effect:
    """What the result of one pass has more than another's, on the same batches.

    Attributes:
        output: Root mean square change of the output, over its standard deviation over the samples.
        disagreement: Share of samples whose largest output is another one; None where the output is no `[N, K]`.
        loss: Loss of the first minus that of the second; None without a loss.
        loss_interval: 95 % interval of it over the batches; None with fewer than three.
        base: Loss of the second.
        samples: How many samples.
        batches: In how many batches.
    """

    output: float
    disagreement: float | None
    loss: float | None
    loss_interval: tuple[float, float] | None
    base: float | None
    samples: int
    batches: int

    @property
    def confidence(self) -> str:
        """High, medium or low."""
        if self.loss is None:
            return "high" if self.samples >= 256 else "medium" if self.samples >= 64 else "low"
        if self.loss_interval is None or self.loss_interval[0] <= 0 <= self.loss_interval[1]:
            return "low"
        return "high" if self.samples >= 256 and self.batches >= 8 else "medium"

    @property
    def severity(self) -> Severity:
        """By how much worse the first is; a note where it is not worse."""
        if self.loss is None or self.base is None:
            return Severity.WARNING if self.output > OUTPUT_MATTERS_ALONE else Severity.NOTE
        # What is sure to be lost counts; where there are too few batches to say, what was seen, and no error.
        lost = self.loss if self.loss_interval is None else min(self.loss, max(0.0, self.loss_interval[0]))
        relative = lost / max(abs(self.base), 1e-12)
        if relative > LOSS_SEVERE and self.output > OUTPUT_SEVERE and self.confidence != "low":
            return Severity.ERROR
        return Severity.WARNING if relative > LOSS_MATTERS and self.output > OUTPUT_MATTERS else Severity.NOTE

    @property
    def cost(self) -> dict[str, float]:
        """In loss, where there is one, and in samples that are classified otherwise."""
        found = {} if self.loss is None else {"loss": self.loss}
        return found if self.disagreement is None else {**found, "other_class": self.disagreement}

    def __str__(self) -> str:
        parts = []
        if self.loss is not None and self.base is not None:
            interval = ""
            if self.loss_interval is not None:
                interval = " (95 % interval {} to {})".format(*map(signed, self.loss_interval))
            parts.append(f"loss {self.base + self.loss:.3g} against {self.base:.3g}{interval}")
        parts.append(f"the output changes by {self.output:.2g} of its deviation over the samples")
        if self.disagreement is not None:
            parts.append(f"{self.disagreement:.1%} of the samples get another class")
        return "; ".join(parts)


def effect(of: Outcome, against: Outcome) -> Effect:
    """What `of` has more than `against`."""
    samples = sum(len(y) for y in of.outputs)
    if len({y.shape[1:] for y in of.outputs}) == 1:
        y, other = torch.cat(of.outputs), torch.cat(against.outputs)
    else:  # results of several sizes
        y, other = (torch.cat([y.reshape(-1, 1) for y in outcome.outputs]) for outcome in (of, against))
    spread = (other - other.mean(0)).square().mean().sqrt()
    change = ((y - other).square().mean().sqrt() / spread.clamp_min(1e-30)).item()
    disagreement = None
    if y.dim() == 2 and y.shape[1] >= 2:
        disagreement = (y.argmax(1) != other.argmax(1)).double().mean().item()
    loss = base = interval = None
    if of.losses and against.losses:
        base = against.loss
        differences = torch.tensor(of.losses, dtype=torch.float64) - torch.tensor(against.losses, dtype=torch.float64)
        loss = differences.mean().item()
        if len(differences) >= 3:
            half = student_t(len(differences) - 1) * (differences.std() / math.sqrt(len(differences))).item()
            interval = (loss - half, loss + half)
    return Effect(change, disagreement, loss, interval, base, samples, len(of.outputs))


def signed(value: float) -> str:
    """A number in three significant digits with its sign, a true minus."""
    return f"{value:+.3g}".replace("-", "−")


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 5 % for 2 degrees of freedom and 1 % from 3.

    Source: the Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5.
    """
    z, n = 1.959964, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))
