"""The registers of all threads that run at the same time: one array a register, with one value a thread."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ops.triton.emulator.faults import Unsupported
from tests.ops.triton.emulator.ptx import Kernel

Array = NDArray[Any]
Mask = Array | None  # of the active threads; None: all

WARP = 32

# bf16 has no NumPy type; its bits are kept.
_DTYPES: dict[str, type] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    **{f"{prefix}{8 * size}": getattr(np, f"{name}{8 * size}")
       for prefix, name in (("b", "uint"), ("u", "uint"), ("s", "int")) for size in (1, 2, 4, 8)},
}  # fmt: skip
_HEXADECIMAL_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})")
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")


def dtype(kind: str) -> np.dtype[Any]:
    """Return the NumPy type of a PTX type."""
    if kind not in _DTYPES:
        raise Unsupported(f"The emulator does not know the type {kind!r}.")
    return np.dtype(_DTYPES[kind])


def unsigned(kind: str) -> np.dtype[Any]:
    """Return the unsigned integer type of a PTX type's size."""
    return np.dtype(np.bool_) if kind == "pred" else np.dtype(f"u{dtype(kind).itemsize}")


class Lanes:
    """Registers and special registers of `programs` × `threads` lanes. Registers are written in place.

    Args:
        kernel: The kernel.
        programs: The number of each program in the grid.
        grid: The number of programs in the grid.
    """

    def __init__(self, kernel: Kernel, programs: Array, grid: int) -> None:
        self.threads = kernel.threads
        self.count = len(programs) * kernel.threads
        self.programs = np.repeat(np.arange(len(programs)), kernel.threads)  # of each lane
        self.thread = np.tile(np.arange(kernel.threads), len(programs))
        self.warps = np.arange(self.count) // WARP
        self._values = {name: np.zeros(self.count, unsigned(kind)) for name, kind in kernel.registers.items()}
        self._special = {
            "%tid.x": self.thread, "%ctaid.x": np.repeat(programs, kernel.threads), "%laneid": self.thread % WARP,
            "%ntid.x": kernel.threads, "%nctaid.x": grid, "global_smem": 0, "true": 1, "false": 0, "WARP_SZ": WARP,
            **{f"%{name}.{axis}": value for name, value in (("tid", 0), ("ctaid", 0), ("ntid", 1), ("nctaid", 1))
               for axis in "yz"},
        }  # fmt: skip

    def read(self, operand: str, kind: str) -> Array:
        """Return an operand as an array of a type that shows later values of the register, too."""
        wanted = dtype(kind)
        if operand in self._values:
            register = self._values[operand]
            if register.dtype == wanted or register.dtype.itemsize == wanted.itemsize != 1:
                return register.view(wanted)
            if register.dtype.itemsize > wanted.itemsize and wanted != np.bool_:  # the low bits
                return register.view(wanted)[:: register.dtype.itemsize // wanted.itemsize]
            raise Unsupported(f"The emulator expects a register of at least {kind} for {operand}.")
        if operand in self._special:
            value = np.asarray(self._special[operand]).astype(wanted)
        else:
            value = _constant(operand, kind)
        return np.broadcast_to(value, self.count)

    def write(self, operand: str, kind: str, values: Array, mask: Mask) -> None:
        """Write values of a type to a register."""
        self.target(operand, kind)(values, mask)

    def target(self, operand: str, kind: str) -> Callable[[Array, Mask], None]:
        """Return a function that writes values of a type to a register, extended by sign or zeros if it is wider."""
        if operand == "_":
            return lambda values, mask: None
        register, wanted = self._register(operand), dtype(kind)
        if register.itemsize < wanted.itemsize or (register.dtype == np.bool_) != (wanted == np.bool_):
            raise Unsupported(f"The emulator expects a register for {kind}, got {operand}.")
        if register.itemsize > wanted.itemsize:
            wanted = np.dtype(f"{'i' if kind.startswith('s') else 'u'}{register.itemsize}")
        view = register.view(wanted)

        def write(values: Array, mask: Mask) -> None:
            np.copyto(view, values, where=True if mask is None else mask)

        return write

    def _register(self, operand: str) -> Array:
        if operand not in self._values:
            raise Unsupported(f"The emulator does not know the operand {operand!r}.")
        return self._values[operand]


def _constant(operand: str, kind: str) -> Array:
    wanted = dtype(kind)
    if floating := _HEXADECIMAL_FLOAT.fullmatch(operand):
        bits = np.array(int(floating[1], 16), np.dtype(f"u{len(floating[1]) // 2}"))
        if bits.itemsize != wanted.itemsize:
            raise Unsupported(f"The emulator expects a constant of type {kind}, got {operand}.")
        return bits.view(wanted)
    if not _INTEGER.fullmatch(operand):
        raise Unsupported(f"The emulator does not know the operand {operand!r}.")
    value = int(operand.rstrip("U"), 0)
    if wanted.kind == "b":
        return np.array(bool(value))
    return np.array(value % 2 ** (8 * wanted.itemsize), unsigned(kind)).view(wanted)
