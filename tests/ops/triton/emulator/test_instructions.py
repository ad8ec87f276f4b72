"""Every instruction on registers that the kernels use, against NumPy, torch or exact fractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.ops.triton.emulator.programs import run

Array = NDArray[Any]
F, D, H = np.float32, np.float64, np.float16

_VALUES = (0.0, -0.0, 1.0, -1.5, 2.0**-140, -(2.0**-149), 3.4e38, -1e-38, np.inf, -np.inf, np.nan, 1 / 3, 1e10, 0.1)


def floats(dtype: type, operands: int) -> list[Array]:
    """Every combination of special values, and random ones; as many as fill whole warps."""
    combinations = list(itertools.product(_VALUES[: 14 if operands < 3 else 12], repeat=operands))
    random = np.random.default_rng(0).standard_normal((-len(combinations) % 32 + 512, operands))
    with np.errstate(over="ignore"):
        rows = np.concatenate([combinations, random * 2.0 ** np.round(random[:, ::-1] * 9)])
        return list(rows.T.astype(dtype, order="C"))


def integers(dtype: type, operands: int) -> list[Array]:
    info = np.iinfo(dtype)
    special = [0, 1, 2, 7, 31, 32, 33, 255, info.max, info.min, info.max // 3, *([-1, -7] if info.min else [])]
    combinations = list(itertools.product(special[: 13 if operands < 3 else 8], repeat=operands))
    random = np.random.default_rng(0).integers(info.min, info.max, (-len(combinations) % 32 + 64, operands), dtype)
    return list(np.concatenate([np.array(combinations, dtype), random]).T.copy())


def compute(operation: str, operands: list[Array], result: type, immediate: str = "") -> Array:
    """Execute an instruction on each row of operands, in one thread each."""
    names = {1: "%p", 2: "%h", 4: "%r", 8: "%d"}
    load, registers = "", []
    sizes = [o.itemsize for o in operands]
    for i, size in enumerate(sizes):
        registers.append(f"{names[size]}{i + (20 if size > 2 else 1)}")
        load += f"mul.wide.s32 %d10, %r2, {size}; add.s64 %d10, %d10, %d{i};"
        load += f"ld.global.b{8 * size} {registers[-1]}, [%d10];"
    rows, width, output = len(operands[0]), np.dtype(result).itemsize, len(operands)
    predicate = result is np.bool_
    store = "selp.b16 %h0, 1, 0, %p0;" if predicate else ""
    target = "%p0" if predicate else f"{names[width]}{0 if width == 2 else 31}"
    stored, size = ("%h0", 2) if predicate else (target, width)
    kept = np.zeros(rows, np.uint16 if predicate else result)
    run(
        f"mad.lo.s32 %r2, %r1, 32, %r0; {load} {operation} {target}, {', '.join(registers)}{immediate}; {store}"
        f"mul.wide.s32 %d10, %r2, {size}; add.s64 %d10, %d10, %d{output}; st.global.b{8 * size} [%d10], {stored};",
        *(_tensor(o) for o in operands),
        _tensor(kept),
        programs=rows // 32,
    )
    return kept.astype(np.bool_) if predicate else kept


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(values.view(f"i{values.itemsize}"))


def assert_same(found: Array, expected: Array) -> None:
    """Compare bits, except those of NaN."""
    assert found.dtype == expected.dtype
    if found.dtype.kind == "f":
        both = np.isnan(found) & np.isnan(expected)
        found, expected = (
            np.where(both, 0, t).astype(found.dtype).view(f"u{found.itemsize}") for t in (found, expected)
        )
    np.testing.assert_array_equal(found, expected)


def larger(a: Array, b: Array) -> Array:
    return np.array(
        [x if math.isnan(y) or x > y or (x == y and not np.signbit(x)) else y for x, y in zip(a, b, strict=True)]
    )


def smaller(a: Array, b: Array) -> Array:
    return np.array(
        [x if math.isnan(y) or x < y or (x == y and np.signbit(x)) else y for x, y in zip(a, b, strict=True)]
    )


def flush(a: Array) -> Array:
    return np.where(np.abs(a) < 2.0**-126, np.copysign(F(0), a), a)


ON_FLOATS: list[tuple[str, type, int, Callable[..., Array]]] = [
    ("add", F, 2, np.add), ("add", D, 2, np.add), ("sub", F, 2, np.subtract), ("sub", D, 2, np.subtract),
    ("mul", F, 2, np.multiply), ("mul", D, 2, np.multiply), ("div.rn", F, 2, np.divide), ("div.rn", D, 2, np.divide),
    ("add.ftz", F, 2, lambda a, b: flush(flush(a) + flush(b))), ("mul.rn", F, 2, np.multiply),
    ("max", F, 2, larger), ("min", F, 2, smaller), ("max", D, 2, larger), ("min", D, 2, smaller),
    ("max.NaN", F, 2, np.maximum), ("min.NaN", F, 2, np.minimum),
    ("abs", F, 1, np.abs), ("neg", F, 1, np.negative), ("neg", D, 1, np.negative),
    ("abs.ftz", F, 1, lambda a: flush(np.abs(a))),
    ("sqrt.rn", F, 1, np.sqrt), ("sqrt.rn", D, 1, np.sqrt), ("rcp.rn", F, 1, lambda a: F(1) / a),
    ("mov", F, 1, lambda a: a), ("mov", D, 1, lambda a: a),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "number", "function"), ON_FLOATS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_arithmetic_on_floats_is_numpys(name: str, dtype: type, number: int, function: Callable[..., Array]) -> None:
    operands = floats(dtype, number)
    with np.errstate(all="ignore"):
        expected = function(*operands).astype(dtype)
    if name.startswith(("max", "min")):  # NumPy does not order zeros
        zero = (operands[0] == 0) & (operands[1] == 0)
        ordered = (larger if name.startswith("max") else smaller)(*operands)
        expected = np.where(zero, ordered, expected).astype(dtype)
    assert_same(compute(f"{name}.f{8 * np.dtype(dtype).itemsize}", operands, dtype), expected)


def rounded(value: Fraction, dtype: type) -> Any:
    """Round an exact value: to float64 by Python, to float32 by the nearest of the neighbours."""
    if dtype is D:
        return D(value.numerator / value.denominator)
    near = F(float(value))
    if not np.isfinite(near):
        return near
    around = [np.nextafter(near, F(-np.inf)), near, np.nextafter(near, F(np.inf))]
    finite = [a for a in around if np.isfinite(a)]
    return min(finite, key=lambda a: (abs(Fraction(float(a)) - value), int(np.array(a).view(np.uint32)) & 1))


@pytest.mark.parametrize("dtype", [F, D])
def test_a_fused_multiply_add_rounds_once(dtype: type) -> None:
    a, b, c = floats(dtype, 3)
    half = len(a) // 2
    with np.errstate(all="ignore"):  # sums that nearly cancel, where rounding twice is seen
        c[:half] = -(a[:half] * b[:half])
        c[half : half + 400] = (a * b)[half : half + 400] * dtype(2.0**23 if dtype is F else 2.0**52)
        naive = a * b + c
    found = compute(f"fma.rn.f{8 * np.dtype(dtype).itemsize}", [a, b, c], dtype)
    special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    with np.errstate(all="ignore"):  # in float32, products overflow that do not in a fused multiply-add
        wide = (a.astype(D) * b.astype(D) + c.astype(D)).astype(dtype)
    assert_same(found[special], wide[special])
    ordinary = np.isfinite(naive) & (np.abs(naive) < np.finfo(dtype).max / 2) & ~special
    values = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True) if
              np.isfinite(x) and np.isfinite(y) and np.isfinite(z)]  # fmt: skip
    expected = naive.copy()
    expected[~special] = [rounded(v, dtype) if v and abs(v) < np.finfo(dtype).max else n
                          for v, n in zip(values, naive[~special], strict=True)]  # fmt: skip
    assert_same(found[ordinary], expected[ordinary])
    assert (expected != naive)[ordinary].sum() > 50


@pytest.mark.parametrize(
    ("name", "number", "ulps", "function"),
    [
        ("div.full", 2, 2, np.divide), ("rcp.approx", 1, 1, np.reciprocal), ("sqrt.approx", 1, 1, np.sqrt),
        ("rsqrt.approx", 1, 1, lambda a: 1 / np.sqrt(a)), ("ex2.approx", 1, 2, np.exp2), ("lg2.approx", 1, 1, np.log2),
    ],
)  # fmt: skip
def test_approximate_instructions_err_up_to_the_documented_error(
    name: str, number: int, ulps: int, function: Callable[..., Array]
) -> None:
    operands = floats(F, number)
    found = compute(f"{name}.f32", operands, F)
    with np.errstate(all="ignore"):
        exact = function(*(o.astype(D) for o in operands)).astype(F)
        distance = np.abs(found.view(np.int32).astype(np.int64) - exact.view(np.int32))
    special = ~np.isfinite(exact) | (exact == 0)
    assert_same(found[special], exact[special])
    assert distance[~special].max() == ulps
    assert_same(found, compute(f"{name}.f32", operands, F))


def test_flushing_affects_subnormal_numbers_only() -> None:
    a, b, c = (t[:512] for t in floats(F, 3))
    with np.errstate(all="ignore"):
        plain = compute("fma.rn.f32", [flush(a), flush(b), flush(c)], F)
    assert_same(compute("fma.rn.ftz.f32", [a, b, c], F), flush(plain))
    x = np.linspace(-160, 10, 512).astype(F)
    found = compute("ex2.approx.ftz.f32", [x], F)
    assert ((found == 0) == (x < -126)).all()


UNSIGNED, SIGNED = [np.uint16, np.uint32, np.uint64], [np.int16, np.int32, np.int64]


def divide(a: Array, b: Array) -> Array:
    return np.array(
        [int(x) // int(y) if (x < 0) == (y < 0) else -(abs(int(x)) // abs(int(y))) for x, y in zip(a, b, strict=True)],
        object,
    )


ON_INTEGERS: list[tuple[str, int, Callable[..., Any]]] = [
    ("add", 2, lambda a, b: a + b), ("sub", 2, lambda a, b: a - b), ("mul.lo", 2, lambda a, b: a * b),
    ("mad.lo", 3, lambda a, b, c: a * b + c), ("min", 2, np.minimum), ("max", 2, np.maximum),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [*UNSIGNED[1:], *SIGNED[1:]])
@pytest.mark.parametrize(("name", "number", "function"), ON_INTEGERS, ids=lambda v: v if isinstance(v, str) else "")
def test_arithmetic_on_integers_wraps(name: str, number: int, function: Callable[..., Array], dtype: type) -> None:
    operands = integers(dtype, number)
    kind = f"{'s' if np.dtype(dtype).kind == 'i' else 'u'}{8 * np.dtype(dtype).itemsize}"
    exact = function(*(o.astype(object) for o in operands))
    modulus = 2 ** (8 * np.dtype(dtype).itemsize)
    expected = np.array([int(e) % modulus for e in exact], f"u{np.dtype(dtype).itemsize}").view(dtype)
    assert_same(compute(f"{name}.{kind}", operands, dtype), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_division_of_integers_rounds_toward_zero(dtype: type) -> None:
    a, b = integers(dtype, 2)
    ordinary = (b != 0) & ~((a == np.iinfo(dtype).min) & (b.astype(object) == -1))
    a, b = (t[ordinary][: ordinary.sum() // 32 * 32].copy() for t in (a, b))
    kind = f"{'s' if np.dtype(dtype).kind == 'i' else 'u'}{8 * np.dtype(dtype).itemsize}"
    quotient = divide(a, b)
    assert_same(compute(f"div.{kind}", [a, b], dtype), quotient.astype(dtype))
    assert_same(compute(f"rem.{kind}", [a, b], dtype), (a.astype(object) - quotient * b.astype(object)).astype(dtype))


@pytest.mark.parametrize(("kind", "dtype", "wide"), [("s32", np.int32, np.int64), ("u32", np.uint32, np.uint64)])
def test_wide_products_keep_all_bits(kind: str, dtype: type, wide: type) -> None:
    a, b = integers(dtype, 2)
    exact = a.astype(wide) * b.astype(wide)
    assert_same(compute(f"mul.wide.{kind}", [a, b], wide), exact)
    assert_same(compute(f"mul.hi.{kind}", [a, b], dtype), (exact >> wide(32)).astype(dtype))
    x, y = integers(wide, 2)
    high = np.array([int(i) * int(j) >> 64 for i, j in zip(x, y, strict=True)], wide)
    assert_same(compute(f"mul.hi.{kind[0]}64", [x, y], wide), high)
    c = exact[::-1].copy()
    assert_same(compute(f"mad.wide.{kind}", [a, b, c], wide), exact + c)


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_bitwise_operations_and_shifts_are_numpys(dtype: type) -> None:
    a, b = integers(dtype, 2)
    bits = 8 * np.dtype(dtype).itemsize
    kind, signed = f"b{bits}", f"i{bits // 8}"
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert_same(compute(f"{name}.{kind}", [a, b], dtype), function(a, b))
    assert_same(compute(f"not.{kind}", [a], dtype), ~a)
    by = (np.arange(len(a)) % 70).astype(np.uint32)
    exact = [(int(x) << int(s)) % 2**bits for x, s in zip(a, by, strict=True)]
    assert_same(compute(f"shl.{kind}", [a, by], dtype), np.array(exact, dtype))
    exact = [int(x) >> int(s) for x, s in zip(a, by, strict=True)]
    assert_same(compute(f"shr.u{bits}", [a, by], dtype), np.array(exact, dtype))
    exact = [int(x) >> int(s) for x, s in zip(a.view(signed), by, strict=True)]
    assert_same(compute(f"shr.s{bits}", [a, by], dtype), np.array(exact, signed).view(dtype))


def test_bit_fields_bytes_and_counts() -> None:
    a, b = integers(np.uint32, 2)
    for position, length in ((0, 1), (5, 1), (6, 8), (0, 32), (28, 8), (3, 0)):
        fields = [(int(x) >> position) & ((1 << length) - 1) for x in a]
        assert_same(compute("bfe.u32", [a], np.uint32, f", {position}, {length}"), np.array(fields, np.uint32))
        signed = [f - (1 << length) if length and f >> (length - 1) else f for f in fields]
        assert_same(compute("bfe.s32", [a], np.int32, f", {position}, {length}"), np.array(signed, np.int32))
    octets = np.stack([a, b], 1).view(np.uint8)
    chosen = octets[:, [1, 4, 7, 2]].copy().view(np.uint32)[:, 0]
    assert_same(compute("prmt.b32", [a, b], np.uint32, ", 0x2741"), chosen)
    negative = np.where(octets[:, 3] & 0x80, 0xFF, 0).astype(np.uint32)
    assert_same(compute("prmt.b32", [a, b], np.uint32, ", 0x444B") & np.uint32(0xFF), negative)
    assert_same(compute("popc.b32", [a], np.uint32), np.array([int(x).bit_count() for x in a], np.uint32))
    majority = (a & b) | (a & a) | (b & a)
    assert_same(compute("lop3.b32", [a, b, a], np.uint32, ", 0xE8"), majority | a)
    assert_same(
        compute("shf.l.wrap.b32", [a, b], np.uint32, ", 40"),
        np.array([((int(y) << 32 | int(x)) << 8 >> 32) % 2**32 for x, y in zip(a, b, strict=True)], np.uint32),
    )


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_are_numpys_and_false_or_true_for_nan(name: str) -> None:
    for kind, dtype in (("f32", F), ("f64", D)):
        a, b = floats(dtype, 2)
        unordered = np.isnan(a) | np.isnan(b)
        expected = COMPARISONS[name](a, b)
        assert_same(compute(f"setp.{name}.{kind}", [a, b], np.bool_), expected & ~unordered)
        assert_same(compute(f"setp.{name}u.{kind}", [a, b], np.bool_), expected | unordered)
    for kind, dtype in (
        ("s32", np.int32),
        ("u32", np.uint32),
        ("s64", np.int64),
        ("b32", np.uint32),
        ("s16", np.int16),
    ):
        a, b = integers(dtype, 2)
        assert_same(compute(f"setp.{name}.{kind}", [a, b], np.bool_), COMPARISONS[name](a, b))


def test_comparisons_know_nan_unsigned_names_and_half_precision() -> None:
    a, b = floats(F, 2)
    unordered = np.isnan(a) | np.isnan(b)
    assert_same(compute("setp.nan.f32", [a, b], np.bool_), unordered)
    assert_same(compute("setp.num.f32", [a, b], np.bool_), ~unordered)
    assert_same(compute("setp.lt.ftz.f32", [a, b], np.bool_), (flush(a) < flush(b)))
    x, y = integers(np.uint32, 2)
    for name, function in (("lo", np.less), ("ls", np.less_equal), ("hi", np.greater), ("hs", np.greater_equal)):
        assert_same(compute(f"setp.{name}.u32", [x, y], np.bool_), function(x, y))
    with np.errstate(over="ignore"):
        halves = [a.astype(H), b.astype(H)]
    assert_same(compute("setp.gtu.f16", halves, np.bool_), ~(halves[0] <= halves[1]))
    tensors = [torch.from_numpy(t).bfloat16() for t in (a, b)]
    bits = [t.view(torch.int16).numpy() for t in tensors]
    assert_same(compute("setp.gtu.bf16", bits, np.bool_), ~(tensors[0] <= tensors[1]).numpy())
    for kind, values, plain in (("f16x2", halves, halves), ("bf16x2", bits, [t.float().numpy() for t in tensors])):
        packed = [np.ascontiguousarray(v).view(np.uint16).reshape(-1, 2).copy().view(np.uint32)[:, 0] for v in values]
        rows = len(packed[0]) // 32 * 32
        both = np.zeros(rows, np.uint16)
        run(
            "mad.lo.s32 %r2, %r1, 32, %r0; mul.wide.s32 %d10, %r2, 4; add.s64 %d11, %d10, %d0; add.s64 %d12, %d10, %d1;"
            f"ld.global.b32 %r3, [%d11]; ld.global.b32 %r4, [%d12]; setp.lt.{kind} %p0|%p1, %r3, %r4;"
            "selp.b16 %h0, 1, 0, %p0; selp.b16 %h1, 2, 0, %p1; or.b16 %h0, %h0, %h1;"
            "mul.wide.s32 %d10, %r2, 2; add.s64 %d10, %d10, %d2; st.global.b16 [%d10], %h0;",
            *(_tensor(p[:rows].copy()) for p in packed),
            _tensor(both),
            programs=rows // 32,
        )
        expected = (plain[0] < plain[1])[: 2 * rows].reshape(-1, 2)
        np.testing.assert_array_equal(both, expected[:, 0] + 2 * expected[:, 1])


def test_conversions_between_floats_round_to_the_nearest_even() -> None:
    a, b = floats(F, 2)
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65520.0, 2.0**-25, 3.3961776e38], F)
    a[: len(ties)] = ties
    with np.errstate(over="ignore"):
        assert_same(compute("cvt.rn.f16.f32", [a], H), a.astype(H))
        bfloat = torch.from_numpy(a).bfloat16()
        nan = np.isnan(a)
        found = compute("cvt.rn.bf16.f32", [a], np.uint16)
        np.testing.assert_array_equal(found[~nan], bfloat.view(torch.int16).numpy().view(np.uint16)[~nan])
        assert (found[nan] == 0x7FFF).all()
        wide = floats(D, 2)[0]
        assert_same(compute("cvt.rn.f32.f64", [wide], F), wide.astype(F))
        assert_same(compute("cvt.f64.f32", [a], D), a.astype(D))
        halves = a.astype(H)
    assert_same(compute("cvt.f32.f16", [halves], F), halves.astype(F))
    assert_same(compute("cvt.f64.f16", [halves], D), halves.astype(D))
    expected = (found.astype(np.uint32) << np.uint32(16)).view(F)
    assert_same(compute("cvt.f32.bf16", [found], F), expected)
    assert_same(compute("cvt.f64.bf16", [found], D), expected.astype(D))
    packed = compute("cvt.rn.bf16x2.f32", [a, b], np.uint32)
    np.testing.assert_array_equal((packed >> np.uint32(16)).astype(np.uint16), found)
    np.testing.assert_array_equal(packed.astype(np.uint16), compute("cvt.rn.bf16.f32", [b], np.uint16))
    packed = compute("cvt.rn.f16x2.f32", [a, b], np.uint32)
    assert_same((packed >> np.uint32(16)).astype(np.uint16).view(H), compute("cvt.rn.f16.f32", [a], H))


@pytest.mark.parametrize(
    ("to", "source"),
    [("s64", "s32"), ("u64", "u32"), ("u32", "u64"), ("u32", "u16"), ("u16", "u32"), ("s32", "s16"), ("s16", "s32")],
)
def test_conversions_between_integers_extend_or_cut(to: str, source: str) -> None:
    dtypes = {kind: np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}").type for kind in (to, source)}
    (a,) = integers(dtypes[source], 1)
    rows = len(a) // 32 * 32
    assert_same(compute(f"cvt.{to}.{source}", [a[:rows].copy()], dtypes[to]), a[:rows].astype(dtypes[to]))


@pytest.mark.parametrize(
    ("to", "source"), [("f32", "u32"), ("f32", "s32"), ("f64", "u64"), ("f64", "s32"), ("f32", "s64")]
)
def test_conversions_of_integers_to_floats_round_to_the_nearest(to: str, source: str) -> None:
    dtype = np.dtype(f"{'i' if source[0] == 's' else 'u'}{int(source[1:]) // 8}").type
    (a,) = integers(dtype, 1)
    a = a[: len(a) // 32 * 32].copy()
    expected = np.array([rounded(Fraction(int(v)), F if to == "f32" else D) for v in a], F if to == "f32" else D)
    assert_same(compute(f"cvt.rn.{to}.{source}", [a], expected.dtype.type), expected)
