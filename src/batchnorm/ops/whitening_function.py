"""Whitening in eager mode, by an `autograd.Function`: with fewer passes over x than the operations of `whitening`.

Forward and backward each compute products of values and a map of values, by `whitening_operators`. Everything between
are small matrices, which autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from batchnorm.ops import eager, routes, whitening, whitening_operators
from batchnorm.ops.parts import BatchStatistics
from batchnorm.ops.whitening import Held, Settings, Whitening

_whiten_products = torch.ops.batchnorm.whiten_products.default
_whiten_map = torch.ops.batchnorm.whiten_map.default
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad(..., is_grads_batched=True)


class _Statistics(NamedTuple):
    """The statistics of a batch of deviations: `products` are the means of `x·xᵀ`; the others are as in `ops.parts`."""

    products: list[Tensor]
    low: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple's method of this name is not needed
    effective_count: Tensor


class _Saved(NamedTuple):
    """The arguments of `WhitenFunction` that are kept for backward."""

    x: Tensor
    mean: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weights: Tensor | None
    held: Held | None
    statistics: _Statistics | None


def _whitening_and_map(saved: _Saved, settings: Settings) -> tuple[Whitening, list[Tensor], Tensor]:
    """Return how x is whitened, and the map from x to y; x is not read."""
    _, _, weight, bias, weights, held, statistics = saved
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

    Deviations are `x - mean`, or x without a mean, which is a constant. The mean of `held` is relative to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        weights: Tensor | None,
        held: Held | None,
        moments: BatchStatistics | None,
        settings: Settings,
        results: list[Whitening],
    ) -> Tensor:
        """Compute y, and save tensors for backward."""
        statistics = None
        if moments is not None:
            packed, _ = _whiten_products(x, mean, None, weights, settings.size)
            packed = (packed / eager.positive(moments.count)).to(eager.statistics_dtype(x))
            products = whitening.unpack_matrices(packed, packed.shape[1])
            statistics = _Statistics(products, moments.mean_low, moments.count, moments.effective_count)
        saved = _Saved(x, mean, weight, bias, weights, held, statistics)
        found, matrices, shift = _whitening_and_map(saved, settings)
        results.append(found)
        tensors, ctx.structure = tree_flatten(saved)
        ctx.save_for_backward(*tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _whiten_map(x, mean, whitening.pack_matrices(matrices), shift, None, None, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Compute the first derivative by few products; higher and vectorized ones through plain torch operations."""
        if dy is None:
            return (None,) * 9
        saved = tree_unflatten(ctx.saved_tensors, ctx.structure)
        by_operations = torch.is_grad_enabled() or routes.is_plain() or _is_batched(dy)
        gradients = _gradients_by_operations if by_operations else _gradients
        with whitening.without_autocast(dy):
            needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
            dx, *affine = gradients(dy, saved, ctx.settings, needs)
            return dx, None, *affine, None, None, None, None, None


def _gradients_by_operations(
    dy: Tensor, saved: _Saved, settings: Settings, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return dx, dγ and dβ, differentiable if gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the first derivative stops here even if two arguments are the same tensor.
        x, weight, bias = (None if t is None else t.view_as(t) for t in (saved.x, saved.weight, saved.bias))
        assert x is not None
        deviations = x if saved.mean is None else x - _along(x, saved.mean)
        training = saved.statistics is not None
        y, _ = whitening.whiten(deviations, weight, bias, saved.weights, saved.held, settings, training)
        y = y.to(x.dtype)
    wanted = [t if need else None for t, need in zip((x, weight, bias), needs, strict=True)]
    return _gradients_of([y], [dy], wanted, create_graph=create_graph)


def _gradients(dy: Tensor, saved: _Saved, settings: Settings, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return dx, dγ and dβ. The mathematics page has the equations in section "Whitening"."""
    with torch.enable_grad():  # autograd differentiates the computations on small matrices
        leaves: _Saved = tree_map_only(Tensor, _as_leaf, saved)
        _, matrices, shift = _whitening_and_map(leaves, settings)
    statistics = leaves.statistics
    inputs = [leaves.weight, leaves.bias, *([statistics.low, *statistics.products] if statistics else ())]
    products, sums = (t.to(shift.dtype) for t in _whiten_products(saved.x, saved.mean, dy, None, settings.size))
    upstream = [*whitening.unpack_matrices(products, products.shape[1]), sums.unsqueeze(1)]
    dweight, dbias, *through = _gradients_of([*matrices, shift], upstream, inputs)
    if not needs[0]:
        return [None, dweight, dbias]
    transposed = whitening.pack_matrices([matrix.detach().mT for matrix in matrices])
    if statistics is None:
        dx = _whiten_map(dy, None, transposed, torch.zeros_like(sums), None, None, None)
    else:
        dlow, *dproducts = (t / eager.positive(statistics.count).to(t.dtype) for t in through if t is not None)
        symmetric = whitening.pack_matrices([t + t.mT for t in dproducts])
        dx = _whiten_map(saved.x, saved.mean, symmetric, dlow, dy, transposed, saved.weights)
    return [dx, dweight, dbias]


def _along(x: Tensor, vector: Tensor) -> Tensor:
    """View `vector [C]` so that it broadcasts with x."""
    return vector.reshape(-1, *(1,) * (x.dim() - 2))


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
        relative = None if held is None else Held(held.mean - mean, held.packed)
        results: list[Whitening] = []
        # Otherwise, autograd keeps deviations instead of x, so that they are computed once.
        deviations = (x, mean) if whitening_operators.are_compiled(x) else (x - _along(x, mean), None)
        y = WhitenFunction.apply(*deviations, weight, bias, weights, relative, moments, settings, results)
        return _in_format_of(x, y, results[0]._replace(mean=mean))


def _in_format_of(x: Tensor, y: Tensor, found: Whitening) -> tuple[Tensor, Whitening]:
    """Convert y to x's dtype and memory format."""
    if torch._C._are_functorch_transforms_active():  # y may be batched although x is not
        return y.to(x.dtype), found
    like = torch.empty_like(x)
    return y if (y.dtype, y.stride()) == (like.dtype, like.stride()) else like.copy_(y), found
