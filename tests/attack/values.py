"""Random calls of the functional form and of layers, compared with the definition in long double."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import batchnorm as bn
from batchnorm import functional, reference
from tests.attack.tally import Tally
from tests.cases import ACTIVATIONS, KINKS, SMOOTH, Case
from tests.tolerance import Array, Terms, assert_within, bound

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
KINDS = ("training", "evaluation", "mask", "weights", "layer", "act", "ghost", "domain")


def wide(t: Tensor | None) -> Array | None:
    """Return the values in long double."""
    return None if t is None else t.detach().double().numpy().astype(np.longdouble)


@dataclass
class Call:
    """One random call, by its number and what is drawn first; the rest is drawn when it is checked."""

    kind: str
    case: Case
    activation: str
    with_residual: bool
    threads: int

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Call:
        kind = str(rng.choice(KINDS))
        samples, channels = int(rng.integers(2, 13)), int(rng.integers(1, 41))
        space = tuple(int(size) for size in rng.integers(1, 10, rng.integers(0, 4)))
        if rng.random() < 0.1:
            samples, channels, space = int(rng.integers(2, 5)), 3, (int(rng.integers(1000, 20_000)),)
        case = Case(
            (samples, channels, *space),
            DTYPES[rng.integers(len(DTYPES))],
            layout=str(rng.choice(LAYOUTS)),
            affine=str(rng.choice(("both", "weight", "bias", "neither"))),
        )
        plain = kind in ("layer", "ghost", "domain")
        activation = "none" if plain else str(rng.choice(ACTIVATIONS))
        return cls(kind, case, activation, not plain and rng.random() < 0.4, int(rng.integers(1, 4)))

    def values(self, rng: np.random.Generator) -> Tensor:
        """Return x, whose channels have very different means and deviations."""
        case, half = self.case, self.case.dtype == torch.float16
        # Long double has 11 bits more than float64, which a mean of 10³ deviations uses up.
        farthest = {torch.float16: 2, torch.float64: 3}.get(case.dtype, 6)
        spread = (1, case.shape[1], *[1] * (len(case.shape) - 2))
        scale = 10.0 ** rng.uniform(*((-2, 1) if half else (-6, 6)), spread)
        offset = scale * 10.0 ** rng.uniform(-1, farthest, spread) * rng.choice((-1, 0, 1), spread)
        x = rng.standard_normal(case.shape)
        if rng.random() < 0.2:
            x[rng.random(case.shape) < 0.05] *= 30 if half else 1000
        x = np.where(rng.random(spread) < 0.05, 0.0, x) * scale + offset
        return case.place(torch.from_numpy(x).to(case.dtype))

    def check(self, rng: np.random.Generator) -> None:
        """Compare y, every gradient and the running statistics with long double."""
        case, shape = self.case, self.case.shape
        x, dy = self.values(rng).requires_grad_(), case.random(int(rng.integers(2**31)))
        residual = case.random(int(rng.integers(2**31))).requires_grad_() if self.with_residual else None
        weight, bias = (p if p is None else p.requires_grad_() for p in case.parameters(int(rng.integers(2**31))))
        eps, momentum = float(10.0 ** rng.uniform(-8, -1)), float(rng.uniform(0, 1))
        parameter, rows, index, weights = float(rng.uniform(0.1, 0.9)), None, None, None
        training = self.kind != "evaluation"
        if self.kind in ("mask", "weights"):
            mask = torch.from_numpy(rng.random((shape[0], *shape[2:])) < 0.7)
            mask.view(-1)[:2] = True
            weights = mask if self.kind == "mask" else mask * torch.from_numpy(rng.uniform(0.1, 3, mask.shape)).float()
        if self.kind == "ghost":
            size = int(rng.integers(2, shape[0] + 1))
            index = reference.ghost_index(wide(x), size)
            rows = int(index.max()) + 1
        if self.kind == "domain":
            index, rows = rng.permuted(np.arange(shape[0]) % 2), 2
        options = {"activation": self.activation, "negative_slope": parameter, "eps": eps}
        affine = {"weight": wide(weight), "bias": wide(bias), "residual": wide(residual)}
        old = case.running(int(rng.integers(2**31)))
        if training:
            per_row = np.bincount(index) if index is not None else [shape[0]]
            if min(per_row) * np.prod(shape[2:]) < 2:
                return  # one value per channel, which the layers refuse
            forward = reference.forward_training(
                wide(x), weights=None if weights is None else wide(weights), index=index, groups=rows,
                **affine, **options,
            )  # fmt: skip
        else:
            forward = reference.forward_inference(wide(x), *map(wide, old), **affine, **options)
        dy = self.away_from_kinks(dy, forward.z)
        running = [t.clone() for t in old]
        y = self.function(running, weight, bias, residual, weights, index, eps, momentum, parameter)(x)
        inputs = {"dx": x, "dweight": weight, "dbias": bias, "dresidual": residual}
        needed = {name: t for name, t in inputs.items() if t is not None}
        found = dict(zip(needed, torch.autograd.grad(y, list(needed.values()), dy), strict=True))

        gradients, terms = reference.backward(wide(dy), forward), Terms(forward, wide(residual), wide(bias))
        dz = terms.dz(wide(dy), smooth=self.activation in SMOOTH)
        sums = terms.sums(dz, like=forward.weight)
        evaluated = 0.25 * np.abs(forward.y)  # f itself rounds twice
        assert_within(y, forward.y, bound(1.5 * terms.z + evaluated, case.dtype, forward.y), "y")
        exact = {"dx": gradients.dx, "dweight": gradients.dweight, "dbias": gradients.dbias, "dresidual": gradients.dz}
        allowed = {
            "dx": bound(terms.dx(dz), case.dtype, exact["dx"]),
            "dweight": bound(sums[1], case.dtype),
            "dbias": bound(sums[0], case.dtype),
            "dresidual": bound(dz, case.dtype, exact["dresidual"]),
        }
        for name, gradient in found.items():
            assert_within(gradient, exact[name], allowed[name], name)
        if training and rows is None:
            self.check_running(forward, old, running, momentum)

    def check_running(
        self, forward: reference.Forward, old: tuple[Tensor, Tensor], new: list[Tensor], momentum: float
    ) -> None:
        assert forward.batch is not None
        mean, var = map(wide, old)
        after = reference.update_running(mean, var, forward.batch, momentum=momentum, convention="torch")
        deviation = Terms(forward, None, None).deviation()
        sizes = (np.abs(mean) + np.abs(forward.mean) + deviation, np.abs(var) + forward.batch.var_unbiased)
        for name, value, got, terms in zip(("mean", "var"), (after.mean, after.var), new, sizes, strict=True):
            assert_within(got, value, bound(terms, self.case.dtype, value), f"running_{name}")

    def away_from_kinks(self, dy: Tensor, z: Array) -> Tensor:
        """Return dy, with zeros where rounding decides f′."""
        near = np.zeros(z.shape, dtype=bool)
        for kink in KINKS.get(self.activation, ()):
            near |= np.abs(z - kink) < 0.05
        return torch.where(torch.from_numpy(near), 0.0, dy).to(dy.dtype)

    def function(
        self,
        running: list[Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        weights: Tensor | None,
        index: Array | None,
        eps: float,
        momentum: float,
        parameter: float,
    ) -> Callable[[Tensor], Tensor]:
        """Return the call, by a layer or by the functional form."""
        activation = {"activation": self.activation, "negative_slope": parameter, "alpha": parameter}
        if self.kind in ("training", "evaluation", "mask", "weights"):
            training = self.kind != "evaluation"
            return lambda x: functional.batch_norm(
                x, *running, weight, bias, training, momentum, eps, residual=residual, mask=weights, **activation
            )
        channels, own = self.case.shape[1], {"eps": eps, "momentum": momentum, "dtype": running[0].dtype}
        layer: torch.nn.Module
        if self.kind == "layer":
            layer = bn.BatchNorm(channels, **own)
        elif self.kind == "act":
            rank = len(self.case.shape) - 2
            if rank == 0 or rank > 3:
                return lambda x: functional.batch_norm(
                    x, *running, weight, bias, True, momentum, eps, residual=residual, **activation
                )
            layer = getattr(bn, f"BatchNormAct{rank}d")(channels, **own, **activation)
        elif self.kind == "ghost":
            assert index is not None
            layer = bn.GhostBatchNorm(channels, ghost_size=int(np.bincount(index)[0]), **own)
        else:
            layer = bn.DomainBatchNorm(channels, num_domains=2, **own)
        layer.weight, layer.bias = (p if p is None else torch.nn.Parameter(p) for p in (weight, bias))
        # Parameters of the layer would be other leaves than the tensors that the gradients are taken of.
        given = {name: p for name, p in (("weight", weight), ("bias", bias)) if p is not None}
        if self.kind in ("layer", "act"):
            given |= {"running_mean": running[0], "running_var": running[1]}
        more = (torch.from_numpy(index),) if self.kind == "domain" else () if residual is None else (residual,)
        return lambda x: torch.func.functional_call(layer, given, (x, *more))


def attack(tally: Tally) -> None:
    """Compare random calls with long double."""
    threads = torch.get_num_threads()
    try:
        for number, rng in tally.tries():
            call = Call.drawn(rng)
            torch.set_num_threads(call.threads)
            with tally.expecting(number, call):
                call.check(rng)
    finally:
        torch.set_num_threads(threads)
