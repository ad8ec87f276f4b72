"""Checks of options, which are plain values. Each error states the requirement, the value received, and the fix."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence

ON_NONFINITE = ("propagate", "skip", "error")
ON_SINGLE = ("error", "running")

# The smallest positive eps, so that 1/sqrt(eps) times a weight fits float32.
LEAST_EPS = 1e-70

# The bounds of a mask's largest weight. Within them, weighted sums of ordinary values fit float32.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-15, 1e15


class InputsNotTaken(ValueError):
    """A model raised an error when it was called with the inputs of an argument."""


def in_one_line(error: BaseException) -> str:
    """Return the class of an exception and the first line of its message, without a final period."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(":. ")


def as_clause(error: BaseException) -> str:
    """Return the message of an exception in one line of at most 300 characters, without a final period."""
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


def as_integer(value: object) -> int | None:
    """Return an integer of any type, such as NumPy's, as an int; None for booleans and everything else."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def checked_integer(caller: str, name: str, value: object, least: int, hint: str) -> int:
    """Return an argument as an int; it must be an integer and not below `least`."""
    number = as_integer(value)
    if number is None:
        raise TypeError(f"{caller} expects {name} to be an int, got {value!r} ({type(value).__name__}). {hint}")
    if number < least:
        raise ValueError(f"{caller} expects {name} >= {least}, got {number}. {hint}")
    return number


def check_number(caller: str, name: str, value: object, hint: str) -> None:
    if not (isinstance(value, int | float) or hasattr(value, "__float__")):  # dynamo cannot trace hasattr
        raise TypeError(f"{caller} expects {name} to be a number, got {value!r} ({type(value).__name__}). {hint}")


def check_eps(caller: str, eps: float, *, zero_allowed: bool = False, name: str = "eps") -> None:
    check_number(caller, name, eps, "The usual value is 1e-5.")
    if eps >= LEAST_EPS or (zero_allowed and eps == 0.0):
        return
    if eps > 0.0:
        raise ValueError(
            f"{caller} expects {name} of at least {LEAST_EPS:g}, got {eps}. For a constant channel, 1/sqrt({name}) "
            "must fit float32; the usual value is 1e-5."
        )
    raise ValueError(
        f"{caller} expects {name} > 0, got {eps}. It keeps 1/sqrt(var + {name}) finite if a channel is constant; "
        "the usual value is 1e-5."
    )


def check_alpha(caller: str, alpha: float) -> None:
    check_number(caller, "alpha", alpha, "The usual value is 1.")
    if not -math.inf < alpha < math.inf:
        raise ValueError(f"{caller} expects alpha to be a finite number, got {alpha}. The usual value is 1.")


def check_momentum(layer: str, momentum: float | None) -> None:
    if momentum is None:
        return
    check_number(layer, "momentum", momentum, "It is the weight of the new batch; None gives the cumulative average.")
    if 0.0 <= momentum <= 1.0:
        return
    raise ValueError(
        f"{layer} expects momentum in [0, 1] or None, got {momentum}. It is the weight of the new batch, "
        "1 minus the momentum of Keras and Flax; None gives the cumulative average."
    )


def check_weight_of_old(layer: str, momentum: float, name: str = "momentum") -> None:
    """Check a momentum in the convention of Keras and Flax."""
    hint = "It is the weight of the old average, 1 minus the momentum of PyTorch; the usual value is 0.99."
    check_number(layer, name, momentum, hint)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"{layer} expects {name} in [0, 1], got {momentum}. {hint}")


def check_weights(caller: str, least: float, most: float) -> None:
    """Check the smallest and the largest weight of a mask."""
    if not (least >= 0 and most < math.inf):  # NaN too
        raise ValueError(
            f"{caller} expects a mask of finite weights >= 0, got values from {least} to {most}. "
            "Use weight 0 for positions that do not count."
        )
    if most > 0 and not _LEAST_WEIGHT <= most <= _MOST_WEIGHT:
        raise ValueError(
            f"{caller} expects the largest weight of a mask from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}, got {most:g}. "
            "Sums could overflow or vanish. Only the ratios of weights matter: use mask / mask.max()."
        )


def check_prior(caller: str, prior: float) -> None:
    if not 0 <= prior < math.inf:
        raise ValueError(
            f"{caller} expects a finite prior >= 0, got {prior}. It is the weight of the former statistics, as a "
            "number of samples; 0 discards them."
        )


def check_max_samples(caller: str, max_samples: int | None) -> None:
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"{caller} expects max_samples >= 1 or None, got {max_samples}. None reads all the data.")


def nonfinite_batch(caller: str, finite: Sequence[bool] = (), *, overflow: bool = False) -> str:
    """Return the error for a batch whose statistics are not finite.

    Args:
        caller: The name at the start of the error.
        finite: Whether the statistics of each channel are finite; empty if this is unknown.
        overflow: Whether all means are finite, so that x is, too.
    """
    broken = [channel for channel, is_finite in enumerate(finite) if not is_finite]
    where = ""
    if broken:
        numbers = ", ".join(map(str, broken[:8])) + (", ..." if len(broken) > 8 else "")
        where = f" in {len(broken)} of {len(finite)} channels ({numbers})"
    cause = "x has NaN or infinity, or its values overflow: look for the source in the layers before this one"
    if overflow:
        cause = "x is finite, but its variance overflows: scale x, lower the learning rate"
    return (
        f"{caller} expects finite statistics of every training batch with on_nonfinite='error', got NaN or infinity"
        f"{where}. {cause}, or use on_nonfinite='skip', which leaves such batches out of the running statistics."
    )


def undecidable_error(caller: str, where: str, hint: str = "Use one of them.") -> str:
    """Return the error for on_nonfinite="error" where an error cannot depend on values."""
    return (
        f"{caller} expects on_nonfinite='propagate' or 'skip' in {where}, got 'error', which depends on values. {hint}"
    )


def check_choice(caller: str, name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{caller} expects {name} to be one of {listed}, got {value!r}. Choose one of them.")
