"""The errors of the emulator.

They are errors of the device, so that no caller takes them for a kernel that does not compile.
"""

from __future__ import annotations

import torch


class Fault(torch.AcceleratorError):
    """The kernel does what a device does not allow, or what depends on chance there."""


class Unsupported(torch.AcceleratorError):
    """The emulator does not know this PTX. It must be taught, because a guess could hide an error."""
