"""The table of cases that every operator and layer is tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import ops

ACTIVATIONS = tuple(ops.ACTIVATIONS)
NEGATIVE_SLOPE = 0.2
EPS = 1e-5
# Where f′ jumps: gradients are compared away from there.
KINKS = {name: row.kinks for name, row in ops.ACTIVATIONS.items()}
# Activations whose f′ is computed from z. f′ varies with z, so that an error of z is an error of f′.
SMOOTH = tuple(name for name, row in ops.ACTIVATIONS.items() if not row.from_output)


def torch_activation(name: str, parameter: float) -> Callable[[Tensor], Tensor]:
    """Return torch's own function of an activation."""
    if name == "hardsigmoid":  # torch multiplies its gradient by 1/6 in float32, for float64 too
        return lambda z: F.relu6(z + 3.0) / 6.0
    function = (lambda z: z) if name == "none" else getattr(F, name)
    return partial(function, **({} if (p := ops.ACTIVATIONS[name].parameter) is None else {p: parameter}))


@dataclass(frozen=True)
class Case:
    """One input: its shape, dtype, place in memory, values, and which parameters there are."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # contiguous | channels_last | sliced | transposed
    affine: str = "both"  # both | weight | bias | neither
    values: str = "normal"  # normal | offset | constant
    offset: float = 0.0
    half_parameters: bool = field(default=False)

    @property
    def id(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), self.layout]
        parts += [self.affine] * (self.affine != "both") + [self.values] * (self.values != "normal")
        parts += [f"{self.offset:g}"] * bool(self.offset) + ["half_parameters"] * self.half_parameters
        return "-".join(parts)

    @property
    def m(self) -> int:
        """Values per channel."""
        return torch.Size(self.shape).numel() // max(self.shape[1], 1)

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def place(self, x: Tensor) -> Tensor:
        """`x` with this case's strides."""
        if self.layout == "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        if self.layout == "sliced":
            holder = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
            holder[..., 1::2] = x
            return holder[..., 1::2]
        if self.layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x.contiguous()

    def random(self, seed: int) -> Tensor:
        """Normal values of x's shape, dtype and layout."""
        generator = torch.Generator().manual_seed(seed)
        return self.place(torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.dtype))

    def x(self, seed: int = 0) -> Tensor:
        x = self.random(seed).double()
        channels = torch.arange(1, self.shape[1] + 1, dtype=torch.float64).reshape(-1, *(1,) * (len(self.shape) - 2))
        if self.values == "offset":
            x = x + self.offset * channels
        elif self.values == "constant":
            x = torch.where(channels % 2 == 1, 12345.678 * channels, x).expand(self.shape)
        return self.place(x.to(self.dtype))

    def parameters(self, seed: int = 1) -> tuple[Tensor | None, Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        dtype = self.dtype if self.half_parameters else self.statistics_dtype
        weight = torch.empty(self.shape[1], dtype=torch.float64).uniform_(-1.5, 1.5, generator=generator).to(dtype)
        bias = torch.empty(self.shape[1], dtype=torch.float64).uniform_(-1, 1, generator=generator).to(dtype)
        return (
            weight if self.affine in ("both", "weight") else None,
            bias if self.affine in ("both", "bias") else None,
        )

    def running(self, seed: int = 2) -> tuple[Tensor, Tensor]:
        """A running mean near x's, and a running variance."""
        generator = torch.Generator().manual_seed(seed)
        near = self.x().double().transpose(0, 1).flatten(1)
        mean = near.mean(1) if near.numel() else torch.zeros(self.shape[1], dtype=torch.float64)
        spread = torch.empty(self.shape[1], dtype=torch.float64).uniform_(0.5, 2.0, generator=generator)
        return (mean + spread - 1).to(self.statistics_dtype), spread.to(self.statistics_dtype)


def _cases() -> Sequence[Case]:
    half, bfloat, double = torch.float16, torch.bfloat16, torch.float64
    return (
        Case((16, 5)),
        Case((300, 33)),
        Case((4, 3, 7)),
        Case((3, 5, 7, 7)),
        Case((2, 4, 3, 4, 5)),
        Case((2, 2, 2, 3, 2, 2)),
        Case((1, 6, 9, 5)),
        Case((8, 1, 6, 6)),
        Case((9, 1)),
        Case((2, 3, 1, 1)),
        Case((2, 2, 150, 151)),
        Case((1, 1, 40_000)),
        Case((3, 17, 5, 9), layout="channels_last"),
        Case((2, 33, 3, 4, 5), layout="channels_last"),
        Case((40_000, 1), layout="channels_last"),
        Case((2, 5, 130, 131), layout="channels_last"),
        Case((4, 6, 5, 8), layout="sliced"),
        Case((4, 6, 5, 8), layout="transposed"),
        Case((12, 7), layout="transposed"),
        Case((4, 6, 5, 5), affine="weight"),
        Case((4, 6, 5, 5), affine="bias"),
        Case((4, 6, 5, 5), affine="neither"),
        *(Case((4, 3, 16, 16), layout=layout, values="offset", offset=offset)
          for layout in ("contiguous", "channels_last") for offset in (1e2, 1e4, 1e6)),
        Case((4, 3, 8, 8), values="constant"),
        Case((4, 3, 8, 8), layout="channels_last", values="constant"),
        Case((0, 3, 4, 4)),
        Case((5, 3, 0)),
        Case((16, 5), double),
        Case((3, 5, 7, 7), double),
        Case((3, 5, 7, 7), double, layout="channels_last"),
        *(Case((3, 5, 7, 7), dtype, layout=layout)
          for dtype in (half, bfloat) for layout in ("contiguous", "channels_last", "transposed")),
        Case((64, 9), bfloat),
        Case((64, 9), half),
        Case((3, 5, 7, 7), half, half_parameters=True),
        Case((3, 5, 7, 7), bfloat, half_parameters=True),
        Case((4, 3, 16, 16), bfloat, values="offset", offset=1e2),
        Case((4, 3, 8, 8), half, values="offset", offset=1e3),
        Case((0, 3, 4, 4), bfloat),
    )  # fmt: skip


CASES = _cases()


def ids(case: Case) -> str:
    return case.id
