"""Freeze the statistics of batch normalization, and unfreeze them."""

from __future__ import annotations

from torch import nn

from batchnorm import walk
from batchnorm.models.report import Report, Result
from batchnorm.models.selection import Selection
from batchnorm.nn import act, batch
from batchnorm.nn.frozen import FrozenBatchNorm, FrozenLayer
from batchnorm.surgery.convert import replacement
from batchnorm.surgery.convert.convert import class_for, replace_layers
from batchnorm.surgery.convert.ranks import rank_of
from batchnorm.surgery.convert.replacement import Replacement, Unconvertible


def freeze(
    model: nn.Module, *, only: Selection | None = None, trainable_affine: bool = False, inplace: bool = False
) -> Result[Report]:
    """Make the model's batch normalization use its running statistics in training too, without updating them.

    Each layer, of torch or of this library, becomes a `FrozenBatchNorm` of its rank, as `convert` would make it.
    `model.train()` does not change that. `unfreeze` restores the same layers.

    Parameters that stop training lose their gradients. torch's optimizers then skip them (except `LBFGS`), also with
    momentum and weight decay. They keep their momentum, and resume with it after `unfreeze`.

    Args:
        model: Any module.
        only: The layers to freeze, as in `convert`.
        trainable_affine: Whether γ and β that were trainable stay trainable.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model, and the report. A layer is left if it has no running statistics, or does more than a frozen layer.

    Raises:
        ValueError: a pattern matches no layer; no layer can be frozen; the model is sharded, or in
            `DistributedDataParallel` without `find_unused_parameters=True`. The model is then unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> frozen_model = freeze(model).model.train()
        >>> frozen_model[1]
        FrozenBatchNorm1d(8, eps=1e-05, ..., trainable_affine=False)
        >>> unfreeze(frozen_model).model[1]
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    def choose(found: walk.Found, layer: nn.Module) -> Replacement:
        if isinstance(layer, FrozenLayer):
            affine = f", with trainable_affine={layer.trainable_affine}: unfreeze it first to change that"
            raise Unconvertible("it is frozen already" + affine * (layer.trainable_affine != trainable_affine))
        options = {"trainable_affine": trainable_affine}
        return replacement.make(layer, class_for(layer, FrozenBatchNorm, rank_of(layer)), options, found.path)

    return replace_layers("freeze", model, choose, only=only, inplace=inplace)


def unfreeze(model: nn.Module, *, only: Selection | None = None, inplace: bool = False) -> Result[Report]:
    """Restore the class, options, momentum and `requires_grad` of the model's frozen layers.

    Changes made since freezing are kept: momentum, `requires_grad`, mode, values loaded from a checkpoint. A layer that
    was created as a `FrozenBatchNorm` becomes a `BatchNorm` of its rank, and trains γ and β. The `FrozenBatchNorm2d` of
    torchvision, detectron2, DETR and similar models becomes a `BatchNorm2d` that also trains γ and β.

    Args:
        model: Any module.
        only: The layers to restore, as in `convert`.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model, and the report.

    Raises:
        ValueError: a pattern matches no frozen layer; the model is sharded; it is in `DistributedDataParallel`, which
            does not know the parameters that would train again. The model is then unchanged.

    Examples:
        >>> from batchnorm.nn import FrozenBatchNorm2d
        >>> unfreeze(nn.Sequential(FrozenBatchNorm2d(8))).model
        Sequential(
          (0): BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        )
    """

    def choose(found: walk.Found, layer: nn.Module) -> Replacement:
        back = replacement.restore(layer, lambda former: not walk.is_frozen(former))
        if back is not None:
            return back
        fused = "activation" in vars(layer)
        kind = getattr(act if fused else batch, f"BatchNorm{'Act' * fused}{rank_of(layer)}")
        made = replacement.make(layer, kind, {}, found.path)
        for name in ("weight", "bias"):
            made.settings[name] = [True] * len(made.settings[name])
        made.origin = None
        return made

    return replace_layers("unfreeze", model, choose, only=only, inplace=inplace, kinds=walk.is_frozen)
