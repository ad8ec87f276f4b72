"""Batch normalization that stops moving, and moves again."""

from __future__ import annotations

from torch import nn

from batchnorm import walk
from batchnorm.models.report import Report, Result
from batchnorm.models.selection import Choice
from batchnorm.nn import act, batch
from batchnorm.nn.frozen import FrozenBatchNorm, FrozenLayer
from batchnorm.surgery.convert import replacement
from batchnorm.surgery.convert.convert import class_for, rank_of, replace_layers
from batchnorm.surgery.convert.replacement import Replacement, Unconvertible


def freeze(
    model: nn.Module, *, only: Choice | None = None, trainable_affine: bool = False, inplace: bool = False
) -> Result[Report]:
    """Let the model's batch normalization use its running statistics in training too, and no longer move them.

    Each layer, torch's own or of this library, becomes a `FrozenBatchNorm` of its rank, as by `convert`:
    `model.train()` does not wake it. `unfreeze` gives the same layers back.

    Args:
        model: Any module.
        only: Which layers, as in `convert`.
        trainable_affine: Whether γ and β are trained on, those that were.
        inplace: Change the model itself, instead of a copy.

    Returns:
        The model, and what was changed and left: without running statistics, or with more in them than a frozen layer
        can do.

    Raises:
        ValueError: a pattern that matches no layer; no layer can be frozen. The model is then as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> frozen_model = freeze(model).model.train()
        >>> frozen_model[1]
        FrozenBatchNorm1d(8, eps=1e-05, ..., trainable_affine=False)
        >>> unfreeze(frozen_model).model[1]
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    def choose(found: walk.Found) -> Replacement:
        layer = found.module
        if isinstance(layer, FrozenLayer):
            with_affine = f", with trainable_affine={layer.trainable_affine}: unfreeze it first to change that"
            raise Unconvertible("it is frozen already" + with_affine * (layer.trainable_affine != trainable_affine))
        options = {"trainable_affine": trainable_affine}
        return replacement.make(layer, class_for(layer, FrozenBatchNorm), options, found.path)

    return replace_layers("freeze", model, choose, only=only, inplace=inplace)


def unfreeze(model: nn.Module, *, only: Choice | None = None, inplace: bool = False) -> Result[Report]:
    """Give the model's frozen layers back what they were: class, options, momentum, and which parameters are trained.

    What was set since is kept: a momentum, `requires_grad`, the mode, values loaded from a checkpoint. A layer that
    was made as a `FrozenBatchNorm` becomes a `BatchNorm` of its rank, and trains γ and β.

    Args:
        model: Any module.
        only: Which layers, as in `convert`.
        inplace: Change the model itself, instead of a copy.

    Returns:
        The model, and what was changed and left.

    Raises:
        ValueError: a pattern that matches no frozen layer. The model is then as it was.

    Examples:
        >>> from batchnorm.nn import FrozenBatchNorm2d
        >>> unfreeze(nn.Sequential(FrozenBatchNorm2d(8))).model
        Sequential(
          (0): BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        )
    """

    def choose(found: walk.Found) -> Replacement:
        layer = found.module
        back = replacement.restore(layer, lambda kind: not issubclass(kind, FrozenLayer))
        if back is not None:
            return back
        fused = "activation" in vars(layer)
        kind = getattr(act if fused else batch, f"BatchNorm{'Act' * fused}{rank_of(layer)}")
        made = replacement.make(layer, kind, {}, found.path)
        for name in ("weight", "bias"):
            made.settings[name] = [True] * len(made.settings[name])
        made.origin = None
        return made

    return replace_layers("unfreeze", model, choose, only=only, inplace=inplace, kinds=FrozenLayer)
