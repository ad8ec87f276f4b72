"""Conversions between types (`cvt`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ops.triton.emulator.lanes import Array, dtype

_INTEGERS = tuple(f"{sign}{8 * size}" for sign in "su" for size in (1, 2, 4, 8))


def bfloat16_to_float32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_to_float64(bits: Array) -> Array:
    return bfloat16_to_float32(bits).astype(np.float64)


def float32_to_bfloat16(values: Array) -> Array:
    """Round to nearest, to the even of two; every NaN becomes the same."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def float32_to_float16(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.where(np.isnan(values), np.array(0x7FFF, np.uint16), values.astype(np.float16).view(np.uint16))


def _pair(convert: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Return a conversion of two values, the first into the upper half."""
    return lambda upper, lower: convert(upper).astype(np.uint32) << np.uint32(16) | convert(lower).astype(np.uint32)


def _cast(kind: str) -> Callable[[Array], Array]:
    target: Any = dtype(kind).type
    return lambda values: values.astype(target)


# The types of the operands, the type of the result, and the function of each conversion.
CONVERSIONS: dict[str, tuple[tuple[str, ...], str, Callable[..., Array]]] = {
    "cvt.f64.f32": (("f32",), "f64", _cast("f64")),
    "cvt.rn.f32.f64": (("f64",), "f32", _cast("f32")),
    "cvt.f32.f16": (("f16",), "f32", _cast("f32")),
    "cvt.f32.bf16": (("bf16",), "f32", bfloat16_to_float32),
    "cvt.f64.f16": (("f16",), "f64", _cast("f64")),
    "cvt.f64.bf16": (("bf16",), "f64", bfloat16_to_float64),
    "cvt.rn.f16.f32": (("f32",), "b16", float32_to_float16),
    "cvt.rn.bf16.f32": (("f32",), "bf16", float32_to_bfloat16),
    "cvt.rn.f16x2.f32": (("f32", "f32"), "f16x2", _pair(float32_to_float16)),
    "cvt.rn.bf16x2.f32": (("f32", "f32"), "bf16x2", _pair(float32_to_bfloat16)),
    **{f"cvt.{to}.{source}": ((source,), to, _cast(to)) for to, source in itertools.permutations(_INTEGERS, 2)},
    **{f"cvt.rn.{to}.{source}": ((source,), to, _cast(to)) for to in ("f32", "f64") for source in _INTEGERS},
}
