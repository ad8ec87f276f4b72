"""Whether an installed wheel works, with nothing installed but batchnorm and torch: run it as a script.

It must have the compiled operators, and they must compute what plain torch operations do.
"""

from __future__ import annotations

import torch

import batchnorm
from batchnorm.ops import compiled


def main() -> None:
    print(f"batchnorm in {batchnorm.__path__[0]}, torch {torch.__version__}")
    print(batchnorm.backends())
    assert batchnorm.backends()["cpu"].startswith("compiled: "), "the compiled operators are missing or did not load"
    torch.manual_seed(0)
    for capability in compiled.cpu_capabilities():
        compiled.set_cpu_capability(capability)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                check(dtype, layout)
        print(f"{capability}: as torch")


def check(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, dy = (torch.randn(8, 5, 9, 9, dtype=dtype).to(memory_format=layout) for _ in range(2))
    own = torch.float64 if dtype == torch.float64 else torch.float32
    ours = outcome(batchnorm.BatchNorm2d(5).to(own), x, dy)
    expected = outcome(torch.nn.BatchNorm2d(5).double(), x.double(), dy.double())
    for name, got in ours.items():
        tolerance = 16 * torch.finfo(dtype).eps * float(expected[name].abs().max())
        torch.testing.assert_close(got, expected[name], rtol=0, atol=tolerance)


def outcome(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    found = {"y": y, "dx": x.grad, "dweight": module.weight.grad, "running_var": module.running_var}
    found["y in evaluation"] = module.eval()(x)
    return {name: value.detach().double() for name, value in found.items()}


if __name__ == "__main__":
    main()
