"""Normalizations of single samples, which erase a sample's data if a group has one value."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.models.report import describe
from batchnorm.surgery.convert import replacement
from batchnorm.surgery.convert.replacement import Replacement, Unconvertible

_MOST_GROUPS = 32
_LEAST_CHANNELS = 16  # of a group, if the input may be [N, C]: the paper's other choice


def is_per_sample(kind: type[nn.Module]) -> bool:
    """Return whether the class normalizes each sample alone."""
    return issubclass(kind, (nn.GroupNorm, nn.LayerNorm, _InstanceNorm))


def make(old: nn.Module, kind: type[nn.Module], options: dict[str, Any], path: str, rank: str) -> Replacement:
    """Return a layer of this class to replace `old`; layer normalization becomes `GroupNorm(1, C)`.

    Args:
        old: The layer to replace.
        kind: The new class, for which `is_per_sample` is true.
        options: The user's arguments of the class.
        path: The layer's path.
        rank: The rank of the layer's input: "1d", which includes `[N, C]`, "2d" or "3d"; "" for any rank.

    Raises:
        Unconvertible: a group may have one value, because the input may be `[N, C]`; otherwise as `replacement.make`.
    """
    channels = int(old.num_features)  # type: ignore[arg-type]
    has_positions = rank in ("2d", "3d") or (rank == "" and issubclass(kind, (nn.InstanceNorm2d, nn.InstanceNorm3d)))
    is_layer_norm = issubclass(kind, nn.LayerNorm)
    if is_layer_norm:
        kind, options = nn.GroupNorm, {"num_groups": 1, **options}
    elif issubclass(kind, nn.GroupNorm):
        options = {"num_groups": number_of_groups(channels, has_positions), **options}
    made = replacement.make(old, kind, options, path)
    if getattr(made.new, "num_groups", channels) == channels and not has_positions:
        raise Unconvertible(
            f"{describe(made.new)} would erase an input [N, C], which has one value per group: choose "
            f"{'fewer groups' if channels > 1 else 'another layer'}, or pass a function if its input is [N, C, L]"
        )
    made.reason = "layer normalization over channels and positions" if is_layer_norm else note_on(made.new)
    return made


def note_on(layer: nn.Module) -> str:
    """Return the condition under which the layer erases its input without an error; empty if there is none."""
    if isinstance(layer, nn.GroupNorm) and layer.num_groups == layer.num_channels:
        return "one channel per group: an input with one position would be erased"
    return ""


def number_of_groups(channels: int, has_positions: bool) -> int:
    """Return the largest number of groups up to 32 that divides C and leaves enough values in each group.

    A group has at least 2 channels, because a map may have one position (after global pooling); and at least 16 if
    the input may have no positions, because two values always become ±1. With fewer channels there is one group.

    Source: Wu & He 2018, Group Normalization, table 3.
    """
    least = 2 if has_positions else _LEAST_CHANNELS
    return max((n for n in range(1, _MOST_GROUPS + 1) if channels % n == 0 and channels // n >= least), default=1)
