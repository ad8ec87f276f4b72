"""Start every kernel at least once with every value of its arguments: a script to run under a sanitizer."""

from __future__ import annotations

import torch

from benchmarks.gpu.static import space


def main(device: str = "cuda") -> int:
    """Make the calls and wait for them; return their number."""
    calls = space.calls(1)
    for operator, choice in calls:
        space.call(operator, choice, device)
        if device == "cuda":
            torch.cuda.synchronize()
    return len(calls)


if __name__ == "__main__":
    print(f"{main()} calls without an error")
