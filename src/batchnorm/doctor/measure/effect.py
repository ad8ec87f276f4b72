"""The effect of normalizing the same batches in another way, on output and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.doctor.finding import Severity
from batchnorm.doctor.wording import figure, signed

# A finding is above a note only if the output changes, relative to its spread over the samples, and the loss grows,
# relative to itself. One is not enough: a loss near zero can grow by a factor that means nothing, and a change of the
# output may have no cost.
OUTPUT_MATTERS, OUTPUT_SEVERE = 0.1, 0.3
LOSS_MATTERS, LOSS_SEVERE = 0.1, 0.5
# Without a loss, the cost of a change is unknown, so the change must be larger, and it is never an error.
OUTPUT_MATTERS_ALONE = 0.4
# Largest number of features that are kept of a sample's output; a larger output is sampled evenly.
_KEPT_FEATURES = 1024


@dataclass(frozen=True)
class Outcome:
    """The results of one pass over the batches.

    Attributes:
        outputs: The features of the first floating-point array that the model returned for each batch.
        losses: Loss of each batch; empty without a loss.
    """

    outputs: list[NDArray[np.float64]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, output: NDArray[np.float64] | None, loss: float | None) -> None:
        """Add a batch; None is left out."""
        self.outputs.extend([] if output is None else [output])
        self.losses.extend([] if loss is None else [loss])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the outputs."""
        return [y.shape for y in self.outputs]

    @property
    def finite(self) -> bool:
        """Whether every output and loss is finite."""
        return all(bool(np.isfinite(y).all()) for y in self.outputs) and all(map(math.isfinite, self.losses))


def features_of(y: Any) -> Any:
    """Return an output `[N, ...]`, in NumPy or PyTorch: `[N, K]` unchanged, any other as `[N, features, 1]`."""
    if y.ndim == 2 and y.shape[1] <= _KEPT_FEATURES:
        return y
    flat = y.reshape(y.shape[0], -1, 1)
    if flat.shape[1] <= _KEPT_FEATURES:
        return flat
    return flat[:, np.linspace(0, flat.shape[1] - 1, _KEPT_FEATURES).astype(int)]


@dataclass(frozen=True)
class Effect:
    """The difference between the results of two passes over the same batches.

    Attributes:
        output: Root mean square change of the output, over its standard deviation over the samples.
        disagreement: Share of samples whose prediction (the largest output) changes; None if the output is not
            `[N, K]`.
        loss: Loss of the first pass minus loss of the second; None without a loss.
        loss_interval: Its 95 % interval over the batches; None with fewer than three.
        base: Loss of the second pass.
        samples: Number of samples.
        batches: Number of batches.
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
        """`high`, `medium` or `low`, by the amount of data."""
        if self.loss is None:
            return "high" if self.samples >= 256 else "medium" if self.samples >= 64 else "low"
        if self.loss_interval is None or self.loss_interval[0] <= 0 <= self.loss_interval[1]:
            return "low"
        return "high" if self.samples >= 256 and self.batches >= 8 else "medium"

    @property
    def severity(self) -> Severity:
        """The severity, by the harm of the first pass; a note if it does none."""
        if self.loss is None or self.base is None:
            return Severity.WARNING if self.output > OUTPUT_MATTERS_ALONE else Severity.NOTE
        # The lower end of the interval counts. Without an interval, the mean counts, and is never an error.
        lost = self.loss if self.loss_interval is None else min(self.loss, max(0.0, self.loss_interval[0]))
        relative = lost / max(abs(self.base), 1e-12)
        if relative > LOSS_SEVERE and self.output > OUTPUT_SEVERE and self.confidence != "low":
            return Severity.ERROR
        return Severity.WARNING if relative > LOSS_MATTERS and self.output > OUTPUT_MATTERS else Severity.NOTE

    @property
    def cost(self) -> dict[str, float]:
        """Added loss and share of changed predictions, if known."""
        found = {} if self.loss is None else {"loss": self.loss}
        return found if self.disagreement is None else {**found, "other_class": self.disagreement}

    def __str__(self) -> str:
        parts = []
        if self.loss is not None and self.base is not None:
            interval = ""
            if self.loss_interval is not None:
                interval = " (95 % interval {} to {})".format(*map(signed, self.loss_interval))
            parts.append(f"loss {figure(self.base + self.loss)} against {figure(self.base)}{interval}")
        parts.append(f"the output changes by {self.output:.2g} standard deviations")
        if self.disagreement is not None:
            parts.append(f"{self.disagreement:.1%} of the predictions change")
        return "; ".join(parts)


def effect_of(outcome: Outcome | None, baseline: Outcome | None) -> Effect | None:
    """Return the effect of the first pass against the second; None if they cannot be compared."""
    if outcome is None or baseline is None or not outcome.outputs or outcome.shapes != baseline.shapes:
        return None
    return compared(outcome, baseline) if outcome.finite and baseline.finite else None


@np.errstate(all="ignore")
def compared(outcome: Outcome, baseline: Outcome) -> Effect:
    """Return the effect of the first pass against the second; both are finite and have the same shapes."""
    samples = sum(len(y) for y in outcome.outputs)
    if len({y.shape[1:] for y in outcome.outputs}) == 1:
        y, other = np.concatenate(outcome.outputs), np.concatenate(baseline.outputs)
    else:  # outputs of several sizes
        y, other = (np.concatenate([y.reshape(-1, 1) for y in one.outputs]) for one in (outcome, baseline))
    spread = np.sqrt(np.square(other - other.mean(0)).mean())
    change = float(np.sqrt(np.square(y - other).mean()) / max(spread, 1e-30))
    disagreement = None
    if y.ndim == 2 and y.shape[1] >= 2:
        disagreement = float((y.argmax(1) != other.argmax(1)).mean())
    loss = base = interval = None
    if outcome.losses and baseline.losses:
        base = sum(baseline.losses) / len(baseline.losses)
        differences = np.subtract(outcome.losses, baseline.losses)
        loss = float(differences.mean())
        if len(differences) >= 3:
            half = student_t(len(differences) - 1) * float(differences.std(ddof=1)) / math.sqrt(len(differences))
            interval = (loss - half, loss + half)
    return Effect(change, disagreement, loss, interval, base, samples, len(outcome.outputs))


def student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, with an error of 5 % for 2 degrees of freedom and 1 % from 3 on.

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
