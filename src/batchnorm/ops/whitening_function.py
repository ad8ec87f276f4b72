"""Whitening in eager mode, by an `autograd.Function`: with fewer passes over x than the operations of `whitening`.

x is viewed as `[P, C, K]`: P samples with K positions innermost in memory, or P = 1 with the channels innermost.
Neither is copied, and a product sums all K positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from batchnorm.ops import eager, routes, whitening
from batchnorm.ops.parts import BatchStatistics
from batchnorm.ops.reduce import sum_pairwise, sum_positions
from batchnorm.ops.whitening import Held, Settings, Whitening

# The values that several steps compute at once: 2 MB in float32.
_BLOCK = 1 << 19

_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad(..., is_grads_batched=True)


class _Planes:
    """The view `[P, C, K]` of x, and of other tensors of its shape."""

    def __init__(self, x: Tensor, size: int) -> None:
        n, self.channels = x.shape[:2]
        positions = x[0, 0].numel()
        self.size = min(size, self.channels)
        # In the other view, a smaller last group is between the samples, or products are larger than their factors.
        innermost = x.movedim(1, -1).is_contiguous() or self.channels % self.size != 0 or positions < self.size
        self.channels_innermost = innermost
        self.count, self.length = (1, n * positions) if innermost else (n, positions)

    def of(self, t: Tensor) -> Tensor:
        """Return `t [N, *, *S]` as `[P, *, K]`: a view, or a copy if its memory layout differs."""
        if self.channels_innermost:
            return t.movedim(1, -1).reshape(1, self.length, -1).mT
        return t.reshape(self.count, -1, self.length).contiguous()

    def empty_like(self, planes: Tensor) -> Tensor:
        """Return a new tensor `[P, C, K]` with groups that are views."""
        if self.channels_innermost:
            return torch.empty_like(planes.mT, memory_format=torch.contiguous_format).mT
        return torch.empty_like(planes)

    def of_weights(self, weights: Tensor | None) -> Tensor | None:
        """Return `weights [N, *S]` as `[P, 1, K]`."""
        return None if weights is None else self.of(weights.unsqueeze(1))

    def restored(self, planes: Tensor, x: Tensor) -> Tensor:
        """Return `planes [P, C, K]` in x's shape."""
        if self.channels_innermost:
            return planes.mT.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
        return planes.reshape(x.shape)

    def groups(self, planes: Tensor) -> list[Tensor]:
        """View `[P, C, *]` as `[P·groups, d, *]`, and a smaller last group as `[1, d, *]`."""
        whole = self.channels // self.size * self.size
        parts = [planes[:, :whole].view(-1, self.size, planes.shape[2])]
        return parts if whole == self.channels else [*parts, planes[:, whole:]]

    def products(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """Return `Σ left·rightᵀ` of each group over planes and positions, `[groups, d, d]`."""
        pairs = zip(self.groups(left), self.groups(right), strict=True)
        return [sum_pairwise(whitening.summed_product(*pair).unflatten(0, (self.count, -1)), 0) for pair in pairs]

    def blocks(self) -> list[slice]:
        """Return the planes in blocks of a few, which stay in the cache from one step of a computation to the next."""
        planes = max(_BLOCK // max(self.channels * self.length, 1), 1)
        return [slice(first, first + planes) for first in range(0, self.count, planes)]

    def add_products(self, onto: Tensor, matrices: Sequence[Tensor], values: Tensor) -> None:
        """Add each group's `matrix·values` to `onto`, in place; both may be a block of planes."""
        for total, matrix, group in zip(self.groups(onto), matrices, self.groups(values), strict=True):
            repeated = matrix.expand(group.shape[0] // matrix.shape[0], *matrix.shape).flatten(0, 1)
            if self.channels_innermost:
                total.mT.baddbmm_(group.mT, repeated.mT)
            else:
                total.baddbmm_(repeated, group)


class _Statistics(NamedTuple):
    """The statistics of a batch of deviations: `products` are the means of `x·xᵀ`; the others are as in `ops.parts`."""

    products: list[Tensor]
    low: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple's method of this name is not needed
    effective_count: Tensor


class _Saved(NamedTuple):
    """The arguments of `WhitenFunction` that are kept for backward."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    weights: Tensor | None
    held: Held | None
    statistics: _Statistics | None


def _whitening_and_map(saved: _Saved, settings: Settings) -> tuple[Whitening, list[Tensor], Tensor]:
    """Return how x is whitened, and the map from x to y; x is not read."""
    _, weight, bias, weights, held, statistics = saved
    if statistics is None:
        assert held is not None
        found = whitening.held_whitening(held, settings.size)
        low = found.mean
    else:
        products, low, _, effective_count = statistics
        matrices = [
            whitening.inverse_square_root(covariance, settings.iterations)
            for covariance in whitening.covariances(products, low, settings)
        ]
        found = Whitening(torch.zeros_like(low), low, matrices, None if weights is None else effective_count)
        if held is not None and weights is not None:
            found = whitening.running_where_single(found, held, settings.size)
            low = found.mean + found.low
    return found, *whitening.affine_map(found._replace(low=low), weight, bias, settings.size)


class WhitenFunction(torch.autograd.Function):
    """y of `whitening.whiten` under autograd; how x was whitened is appended to the list `results`.

    x are deviations from a mean, in the statistics' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weights: Tensor | None,
        held: Held | None,
        moments: BatchStatistics | None,
        settings: Settings,
        results: list[Whitening],
    ) -> Tensor:
        """Compute y, and save tensors for backward."""
        planes = _Planes(x, settings.size)
        values, statistics = planes.of(x), None
        if moments is not None:
            w = planes.of_weights(weights)
            products = planes.products(values if w is None else values * w, values)
            divisor = eager.positive(moments.count)
            products = [(t / divisor).to(x.dtype) for t in products]
            statistics = _Statistics(products, moments.mean_low, moments.count, moments.effective_count)
        saved = _Saved(x, weight, bias, weights, held, statistics)
        found, matrices, shift = _whitening_and_map(saved, settings)
        results.append(found)
        tensors, ctx.structure = tree_flatten(saved)
        ctx.save_for_backward(*tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        y = planes.empty_like(values)
        for block in planes.blocks():
            planes.add_products(y[block].copy_(shift), matrices, values[block])
        return planes.restored(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Compute the first derivative by few products; higher and vectorized ones through plain torch operations."""
        if dy is None:
            return (None,) * 8
        saved = tree_unflatten(ctx.saved_tensors, ctx.structure)
        by_operations = torch.is_grad_enabled() or routes.is_plain() or _is_batched(dy)
        gradients = _gradients_by_operations if by_operations else _gradients
        with whitening.without_autocast(dy):
            return *gradients(dy, saved, ctx.settings, ctx.needs_input_grad[:3]), None, None, None, None, None


def _gradients_by_operations(
    dy: Tensor, saved: _Saved, settings: Settings, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return dx, dγ and dβ, differentiable if gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the first derivative stops here even if two arguments are the same tensor.
        x, weight, bias = (None if t is None else t.view_as(t) for t in saved[:3])
        assert x is not None
        y, _ = whitening.whiten(x, weight, bias, saved.weights, saved.held, settings, saved.statistics is not None)
    wanted = [t if need else None for t, need in zip((x, weight, bias), needs, strict=True)]
    return _gradients_of([y], [dy], wanted, create_graph=create_graph)


def _gradients(dy: Tensor, saved: _Saved, settings: Settings, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return dx, dγ and dβ. The mathematics page has the equations in section "Whitening"."""
    with torch.enable_grad():  # autograd differentiates the computations on small matrices
        leaves: _Saved = tree_map_only(Tensor, _as_leaf, saved)
        _, matrices, shift = _whitening_and_map(leaves, settings)
    planes = _Planes(saved.x, settings.size)
    values, upstream = planes.of(saved.x), planes.of(dy)
    statistics = leaves.statistics
    inputs = [leaves.weight, leaves.bias, *([statistics.low, *statistics.products] if statistics else ())]
    sum_dy = sum_pairwise(sum_positions(upstream), 0).unsqueeze(1)
    sums = [*planes.products(upstream, values), sum_dy]
    dweight, dbias, *through = _gradients_of([*matrices, shift], sums, inputs)
    if not needs[0]:
        return [None, dweight, dbias]
    constant: Tensor | None = None
    symmetric: list[Tensor] = []
    if statistics is not None:
        dlow, *dproducts = (t / eager.positive(statistics.count).to(t.dtype) for t in through if t is not None)
        constant, symmetric = dlow.unsqueeze(1), [t + t.mT for t in dproducts]
    w, transposed = planes.of_weights(saved.weights), [matrix.detach().mT for matrix in matrices]
    dx = planes.empty_like(values)
    for block in planes.blocks():
        if constant is None:
            dx[block] = 0.0
        else:
            planes.add_products(dx[block].copy_(constant), symmetric, values[block])
            if w is not None:
                dx[block] *= w[block]
        planes.add_products(dx[block], transposed, upstream[block])
    return [planes.restored(dx, saved.x), dweight, dbias]


def _as_leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.is_floating_point())


def _gradients_of(
    outputs: Sequence[Tensor], upstream: Sequence[Tensor], inputs: Sequence[Tensor | None], create_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradient for each input that is not None."""
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=create_graph) if wanted else ())
    return [None if t is None else next(found) for t in inputs]


def whiten(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    held: Held | None,
    settings: Settings,
    training: bool,
) -> tuple[Tensor, Whitening]:
    """Return y of x's shape, dtype and memory format, and how x was whitened; `whitening.whiten` has the arguments."""
    with whitening.without_autocast(x):
        if weights is not None:
            # A position with weight 0 may have any value, and 0·NaN would be NaN, here and in backward.
            x = torch.where((weights != 0).unsqueeze(1) | x.isfinite(), x, 0.0)
        if torch.compiler.is_compiling() or routes.is_plain() or x.numel() == 0:
            return _in_format_of(x, *whitening.whiten(x, weight, bias, weights, held, settings, training))
        moments = routes.batch_moments(x, weights=weights) if training else None
        if moments is not None:
            mean = moments.mean
        else:
            assert held is not None
            mean = held.mean
        # Autograd keeps these deviations instead of x.
        deviations = x - mean.reshape(-1, *(1,) * (x.dim() - 2))
        relative = None if held is None else Held(held.mean - mean, held.packed)
        results: list[Whitening] = []
        y = WhitenFunction.apply(deviations, weight, bias, weights, relative, moments, settings, results)
        return _in_format_of(x, y, results[0]._replace(mean=mean))


def _in_format_of(x: Tensor, y: Tensor, found: Whitening) -> tuple[Tensor, Whitening]:
    """Convert y to x's dtype and memory format."""
    if torch._C._are_functorch_transforms_active():  # y may be batched although x is not
        return y.to(x.dtype), found
    like = torch.empty_like(x)
    return y if (y.dtype, y.stride()) == (like.dtype, like.stride()) else like.copy_(y), found
