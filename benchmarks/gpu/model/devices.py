"""Devices, as their data sheets and NVIDIA's programming guide describe them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: Its name.
        architecture: Of its machine code.
        processors: Multiprocessors.
        clock: Boost clock in Hz.
        bandwidth: Of its memory, in bytes per second.
        cache: Bytes of the second-level cache.
        warps: Warps that a multiprocessor holds.
        programs: Programs that a multiprocessor holds.
        shared: Bytes of shared memory of a multiprocessor.
    """

    name: str
    architecture: str
    processors: int
    clock: float
    bandwidth: float
    cache: int
    warps: int
    programs: int
    shared: int

    # Of every architecture since 7.0.
    registers = 65_536
    schedulers = 4  # each issues one instruction of a warp per cycle

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Return the programs that a multiprocessor holds at once.

        Args:
            warps: Warps of a program.
            registers: Registers of a thread, which the device rounds up to multiples of 8.
            shared: Bytes of shared memory of a program, to which the device adds 1 KiB.
        """
        by_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        by_shared = self.shared // (shared + 1024)
        return max(1, min(self.warps // warps, self.programs, by_registers, by_shared))


DEVICES = (
    Device("H200", "sm_90", 132, 1.98e9, 4.8e12, 50 << 20, 64, 32, 228 << 10),
    Device("A100", "sm_80", 108, 1.41e9, 2.039e12, 40 << 20, 64, 32, 164 << 10),
    Device("L4", "sm_89", 58, 2.04e9, 0.3e12, 48 << 20, 48, 24, 100 << 10),
)
