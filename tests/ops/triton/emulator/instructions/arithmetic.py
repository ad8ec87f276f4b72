"""Instructions that compute with registers, as functions of arrays.

The rules list each form that the emulator knows, with all its modifiers, because a modifier that is overlooked changes
the result. Approximate instructions err, deterministically, by up to the error that the PTX manual allows.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ops.triton.emulator.faults import Unsupported
from tests.ops.triton.emulator.instructions.conversions import CONVERSIONS, bfloat16_to_float32
from tests.ops.triton.emulator.lanes import Array, dtype


@dataclass(frozen=True)
class Meaning:
    """A function of arrays of the types `inputs`, whose result, or whose tuple of `results`, has the type `output`."""

    inputs: tuple[str, ...]
    output: str
    function: Callable[..., Any]
    results: int = 1


def flushed(values: Array) -> Array:
    """Replace subnormal numbers by zeros of their sign (`.ftz`)."""
    tiny = np.abs(values) < np.finfo(values.dtype).tiny
    return np.where(tiny, np.copysign(values.dtype.type(0), values), values)


def fused(a: Array, b: Array, c: Array) -> Array:
    """Return a·b + c, rounded once."""
    if a.dtype == np.float64:
        return _fused64(a, b, c).astype(np.float64)
    # The product is exact in float64. The sum is rounded to odd, so that rounding it again is correct.
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + toward, bits).view(np.float64).astype(np.float32)


_fused64 = np.frompyfunc(
    ctypes.CFUNCTYPE(*[ctypes.c_double] * 4)(("fma", ctypes.CDLL("libm.so.6"))), 3, 1
)  # NumPy has no fused multiply-add


def maximum(a: Array, b: Array) -> Array:
    """Return the larger value, the number if one is NaN, and +0 of two different zeros."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def minimum(a: Array, b: Array) -> Array:
    """Return the smaller value, the number if one is NaN, and −0 of two different zeros."""
    return -maximum(-a, -b)


def _propagating(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, function(a, b)).astype(a.dtype)


def approximate(exact: Array, ulps: int) -> Array:
    """Round float64 results to float32, and change them by −ulps to ulps units in the last place, as their bits say."""
    rounded = exact.astype(np.float32)
    bits = rounded.view(np.int32)
    step = (bits * np.int32(-1640531527) >> np.int32(20)) % np.int32(2 * ulps + 1) - np.int32(ulps)
    ordinary = np.isfinite(rounded) & (np.abs(rounded) > 1e-37) & (np.abs(rounded) < 1e38)
    power_of_two = bits & 0x7FFFFF == 0  # often exact on a device
    return np.where(ordinary & ~power_of_two, bits + step, bits).view(np.float32)


def _wide(function: Callable[..., Array], ulps: int) -> Callable[..., Array]:
    return lambda *a: approximate(function(*(t.astype(np.float64) for t in a)), ulps)


def _divide(a: Array, b: Array) -> Array:
    """Divide integers toward zero; all bits are set if b is zero."""
    divisor = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // divisor
    upward = (a != quotient * divisor) & ((a < 0) != (b < 0))  # NumPy rounds down
    return np.where(b == 0, ~a.dtype.type(0), quotient + upward).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b))).astype(a.dtype)


def _high(a: Array, b: Array) -> Array:
    """Return the upper half of a product."""
    return (a.astype(object) * b.astype(object) >> 8 * a.itemsize).astype(a.dtype)


def _shift_left(a: Array, by: Array) -> Array:
    return np.where(by < 8 * a.itemsize, a << np.minimum(by, 63).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Array, by: Array) -> Array:
    """Shift with copies of the sign, or zeros if a is unsigned."""
    width = 8 * a.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by < width, a >> np.minimum(by, width - 1).astype(a.dtype), 0).astype(a.dtype)


def _extract(a: Array, position: Array, length: Array) -> Array:
    """Return `length` bits from `position` on, extended by the highest of them if a is signed."""
    position, length = position & 0xFF, np.minimum(length & 0xFF, 32).astype(np.int64)
    bits = (a.view(np.uint32).astype(np.uint64) >> np.minimum(position, 32).astype(np.uint64)).astype(np.int64)
    bits &= (1 << length) - 1
    if a.dtype.kind == "i":
        top = np.where(length > 0, bits >> np.maximum(length - 1, 0) & 1, 0)
        bits -= top << length
    return bits.astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Return four of the eight bytes of a and b; a set eighth bit of a selector copies the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        choice = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(0xFF)
        byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Return the bitwise function of three inputs that `table` lists (`lop3`)."""
    result = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where(table >> i & 1, term, 0)
    return result


def _count_bits(a: Array) -> Array:
    return sum((a >> a.dtype.type(i) & a.dtype.type(1) for i in range(8 * a.itemsize)), np.zeros_like(a)).astype(
        np.uint32
    )


def _funnel(a: Array, b: Array, by: Array) -> Array:
    """Return the upper half of b:a, shifted left by `by` modulo 32 (`shf.l.wrap`)."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    return (both << (by & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _compare(name: str) -> Callable[[Array, Array], Array]:
    """Return a comparison. A name that ends in u is also true if an operand is NaN; others are false."""

    def compare(a: Array, b: Array) -> Array:
        if a.dtype.kind != "f":
            return _COMPARISONS[name](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        found = _COMPARISONS[name[:2]](a, b)
        return found | unordered if name.endswith("u") else found & ~unordered

    return compare


_Found = re.Match[str]
_Rule = tuple[str, Callable[[_Found], Meaning]]


def _same(number: int, function: Callable[..., Array]) -> Callable[[_Found], Meaning]:
    """Return a rule for `number` operands and a result of one type, the last group; group `ftz` flushes subnormals."""

    def rule(found: _Found) -> Meaning:
        kind = found[found.re.groups]
        flush = found.re.groups > 1 and bool(found[1])
        operation = (lambda *a: flushed(function(*map(flushed, a)))) if flush else function
        return Meaning((kind,) * number, kind, operation)

    return rule


def _mixed(inputs: Sequence[str], output: str, function: Callable[..., Array]) -> Callable[[_Found], Meaning]:
    """Return a rule; "kind" stands for the type that the instruction's last group names."""

    def rule(found: _Found) -> Meaning:
        kind = found[found.re.groups]
        return Meaning(tuple(i.replace("kind", kind) for i in inputs), output.replace("kind", kind), function)

    return rule


def _widening(function: Callable[..., Array], extra: bool) -> Callable[[_Found], Meaning]:
    """Return a rule for operands of 32 bits whose product, and the addend if `extra`, have 64."""

    def rule(found: _Found) -> Meaning:
        narrow, wide = found[1] + "32", found[1] + "64"
        convert = dtype(wide).type
        return Meaning((narrow, narrow, *(wide,) * extra), wide, lambda a, b, *c: function(a.astype(convert), b, *c))

    return rule


def _selected(found: _Found) -> Meaning:
    return Meaning((found[1], found[1], "pred"), found[1], lambda a, b, p: np.where(p, a, b))


def _comparison(found: _Found) -> Meaning:
    name, flush, kind = found.groups()
    compare = _compare(_UNSIGNED.get(name, name))
    if kind in _PACKED:
        unpack = _PACKED[kind]
        return Meaning(
            (kind, kind), "pred", lambda a, b: tuple(map(compare, _halves(unpack, a), _halves(unpack, b))), results=2
        )
    convert: Callable[[Array], Array] = bfloat16_to_float32 if kind == "bf16" else flushed if flush else lambda a: a
    return Meaning((kind, kind), "pred", lambda a, b: compare(convert(a), convert(b)))


_PACKED: dict[str, Callable[[Array], Array]] = {
    "f16x2": lambda bits: bits.view(np.float16), "bf16x2": bfloat16_to_float32
}  # fmt: skip


def _halves(unpack: Callable[[Array], Array], packed: Array) -> tuple[Array, Array]:
    """Return the lower and the upper value of pairs."""
    return unpack(packed.astype(np.uint16)), unpack((packed >> np.uint32(16)).astype(np.uint16))


_F = r"(f32|f64)"
_I = r"([su](?:16|32|64))"
_B = r"(pred|b16|b32|b64)"
_FTZ = r"(\.ftz)?\."
_rule = re.compile
_RULES: list[tuple[re.Pattern[str], Callable[[_Found], Meaning]]] = [
    (_rule(r"add(?:\.rn)?" + _FTZ + _F), _same(2, np.add)),
    (_rule(r"sub(?:\.rn)?" + _FTZ + _F), _same(2, np.subtract)),
    (_rule(r"mul(?:\.rn)?" + _FTZ + _F), _same(2, np.multiply)),
    (_rule(r"fma\.rn" + _FTZ + _F), _same(3, fused)),
    (_rule(r"max" + _FTZ + _F), _same(2, maximum)),
    (_rule(r"min" + _FTZ + _F), _same(2, minimum)),
    (_rule(r"max(\.ftz)?\.NaN\." + _F), _same(2, _propagating(maximum))),
    (_rule(r"min(\.ftz)?\.NaN\." + _F), _same(2, _propagating(minimum))),
    (_rule(r"abs" + _FTZ + _F), _same(1, np.abs)),
    (_rule(r"neg" + _FTZ + _F), _same(1, np.negative)),
    (_rule(r"div\.rn" + _FTZ + _F), _same(2, np.divide)),
    (_rule(r"div\.full" + _FTZ + r"(f32)"), _same(2, _wide(np.divide, 2))),
    (_rule(r"rcp\.rn" + _FTZ + _F), _same(1, np.reciprocal)),
    (_rule(r"rcp\.approx" + _FTZ + r"(f32)"), _same(1, _wide(np.reciprocal, 1))),
    (_rule(r"sqrt\.rn" + _FTZ + _F), _same(1, np.sqrt)),
    (_rule(r"sqrt\.approx" + _FTZ + r"(f32)"), _same(1, _wide(np.sqrt, 1))),
    (_rule(r"rsqrt\.approx" + _FTZ + r"(f32)"), _same(1, _wide(lambda a: 1 / np.sqrt(a), 1))),
    (_rule(r"ex2\.approx" + _FTZ + r"(f32)"), _same(1, _wide(np.exp2, 2))),
    (_rule(r"lg2\.approx" + _FTZ + r"(f32)"), _same(1, _wide(np.log2, 1))),
    (_rule(r"add\." + _I), _same(2, np.add)),
    (_rule(r"sub\." + _I), _same(2, np.subtract)),
    (_rule(r"mul\.lo\." + _I), _same(2, np.multiply)),
    (_rule(r"mul\.hi\.([su](?:32|64))"), _same(2, _high)),
    (_rule(r"mad\.lo\." + _I), _same(3, lambda a, b, c: a * b + c)),
    (_rule(r"mul\.wide\.([su])32"), _widening(lambda a, b: a * b, False)),
    (_rule(r"mad\.wide\.([su])32"), _widening(lambda a, b, c: a * b + c, True)),
    (_rule(r"div\." + _I), _same(2, _divide)),
    (_rule(r"rem\." + _I), _same(2, _remainder)),
    (_rule(r"max\." + _I), _same(2, np.maximum)),
    (_rule(r"min\." + _I), _same(2, np.minimum)),
    (_rule(r"abs\.(s16|s32|s64)"), _same(1, np.abs)),
    (_rule(r"neg\.(s16|s32|s64)"), _same(1, np.negative)),
    (_rule(r"and\." + _B), _same(2, np.bitwise_and)),
    (_rule(r"or\." + _B), _same(2, np.bitwise_or)),
    (_rule(r"xor\." + _B), _same(2, np.bitwise_xor)),
    (_rule(r"not\." + _B), _same(1, np.invert)),
    (_rule(r"shl\.(b16|b32|b64)"), _mixed(("kind", "u32"), "kind", _shift_left)),
    (_rule(r"shr\.([sub](?:16|32|64))"), _mixed(("kind", "u32"), "kind", _shift_right)),
    (_rule(r"bfe\.([su]32)"), _mixed(("kind", "u32", "u32"), "kind", _extract)),
    (_rule(r"(prmt)\.b32"), lambda found: Meaning(("b32",) * 3, "b32", _permute)),
    (_rule(r"(lop3)\.b32"), lambda found: Meaning(("b32",) * 4, "b32", _logic)),
    (_rule(r"shf\.l\.wrap\.b32"), lambda found: Meaning(("b32",) * 3, "b32", _funnel)),
    (_rule(r"popc\.(b32|b64)"), _mixed(("kind",), "u32", _count_bits)),
    (_rule(r"selp\.([a-z]+\d+)"), _selected),
    (_rule(r"setp\.([a-z]+)(\.ftz)?\.([a-z]+\d+(?:x2)?)"), _comparison),
    (_rule(r"mov\.([a-z]+\d*)"), _same(1, lambda a: a)),
]


@functools.cache
def meaning(operation: str) -> Meaning | None:
    """Return what an instruction computes, or None if it is not an instruction on registers alone."""
    for pattern, rule in _RULES:
        if found := pattern.fullmatch(operation):
            return rule(found)
    if operation.startswith("cvt."):
        if operation not in CONVERSIONS:
            raise Unsupported(f"The emulator does not know the conversion {operation}.")
        inputs, output, function = CONVERSIONS[operation]
        return Meaning(inputs, output, function)
    return None
