"""The layer that standardizes by given means and deviations."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import _options
from batchnorm.nn import frozen

_EPS_SHARE = 1e-12  # of the smallest variance of a layer, far below the rounding
_LAYERS = {2: frozen.FrozenBatchNorm1d, 3: frozen.FrozenBatchNorm1d, 4: frozen.FrozenBatchNorm2d,
           5: frozen.FrozenBatchNorm3d}  # fmt: skip


def frozen_layer(
    mean: Tensor, scale: Tensor, ndim: int, dtype: torch.dtype, device: torch.device | str | None
) -> frozen.FrozenBatchNorm:
    """Return the layer that computes `(x - mean)/scale` for x of `ndim` dimensions.

    Raises:
        ValueError: the dtype cannot represent a mean or a scale.
    """
    number = torch.finfo(dtype)
    least = max(number.smallest_normal, _options.LEAST_EPS / _EPS_SHARE)
    var = scale.square().clamp(least, number.max / 4)
    weight = torch.where(var == scale.square(), 1.0, var.sqrt() / scale)
    _check_representable(mean, scale, weight, dtype)
    # The layer adds eps > 0 to the variance, so subtract it first. It is far below the rounding.
    eps = max(var.min().item() * _EPS_SHARE, _options.LEAST_EPS)
    kind = _LAYERS.get(ndim, frozen.FrozenBatchNorm)
    affine = bool((weight != 1).any())
    layer = kind(len(mean), eps=eps, affine=affine, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        layer.get_buffer("running_mean").copy_(mean)
        layer.get_buffer("running_var").copy_(var - eps)
        if affine:
            layer.get_parameter("weight").copy_(weight)
    return layer.eval()


def _check_representable(mean: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Check that a layer of this dtype can store these numbers, and compute with the scale."""
    held, computed = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    fits = mean.abs() <= held.max
    for values, number in ((weight, held), (1 / scale, computed)):
        fits &= (values >= number.smallest_normal) & (values <= number.max)
    if not bool(fits.all()):
        i = int(fits.int().argmin())
        raise ValueError(
            f"Standardizer.to_layer expects means and standard deviations that {dtype} can represent, got mean "
            f"{mean[i]:.3g} and standard deviation {scale[i]:.3g} of feature {i}. Use another dtype, such as "
            "torch.float64, or another unit for the data."
        )
