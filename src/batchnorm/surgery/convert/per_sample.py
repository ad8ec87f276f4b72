"""Normalizations of single samples, which erase a sample's data if a group has one value."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.models.description import describe
from batchnorm.surgery.convert import replacement
from batchnorm.surgery.convert.replacement import Replacement, Unconvertible

_MOST_GROUPS = 32
_LEAST_CHANNELS = 16  # in a group, if the input may be [N, C]; the paper also uses 16


def is_per_sample(kind: type[nn.Module]) -> bool:
    """Return whether the class normalizes each sample alone."""
    return issubclass(kind, (nn.GroupNorm, nn.LayerNorm, _InstanceNorm))


def make(old: nn.Module, kind: type[nn.Module], options: dict[str, Any], path: str, positions: bool) -> Replacement:
    """Return a layer of this class to replace `old`; layer normalization becomes `GroupNorm(1, C)`.

    Args:
        old: The layer to replace.
        kind: The new class, for which `is_per_sample` is true.
        options: The user's arguments of the class.
        path: The layer's path.
        positions: Whether the layer's input is known to have several positions.

    Raises:
        Unconvertible: a group would have one value if the input has one position; or as in `replacement.make`.
    """
    channels = int(old.num_features)  # type: ignore[arg-type]
    is_layer_norm = issubclass(kind, nn.LayerNorm)
    if is_layer_norm:
        kind, options = nn.GroupNorm, {"num_groups": 1, **options}
    elif issubclass(kind, nn.GroupNorm):
        options = {"num_groups": number_of_groups(channels, positions), **options}
    made = replacement.make(old, kind, options, path)
    alone = getattr(made.new, "num_groups", channels) == channels
    if alone and not positions:
        raise Unconvertible(
            f"{describe(made.new)} would erase an input with one position, such as [N, C], because a group has one "
            f"value: choose {'fewer groups' if channels > 1 else 'another layer'}, or pass example_inputs with several "
            "positions"
        )
    made.reason = "layer normalization over channels and positions" if is_layer_norm else note_on(made.new)
    return made


def note_on(layer: nn.Module) -> str:
    """Return the condition under which the layer erases its input without an error; empty if there is none."""
    if isinstance(layer, nn.GroupNorm) and layer.num_groups == layer.num_channels:
        return "one channel per group: an input with one position would be erased"
    return ""


def number_of_groups(channels: int, positions: bool) -> int:
    """Return the largest number of groups up to 32 that divides C and leaves enough values in each group.

    A group has at least 2 channels, because some maps have one position (after global pooling); and at least 16 if
    nothing shows several positions, because two values always become ±1. With fewer channels there is one group.

    Source: Wu & He 2018, Group Normalization, table 3.
    """
    least = 2 if positions else _LEAST_CHANNELS
    return max((n for n in range(1, _MOST_GROUPS + 1) if channels % n == 0 and channels // n >= least), default=1)
