"""The normalizations that can be compared, by name.

`register(name, build, ...)` adds a layer. On the command line a norm is written as its name, followed by a colon and
the options, if any: `batch`, `batch:momentum=0.01`.
"""

from __future__ import annotations

import ast
import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from batchnorm._options import as_clause
from batchnorm.compare.errors import ComparisonError, check_among
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.decorrelated import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d
from batchnorm.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from batchnorm.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from batchnorm.nn.sync import SyncBatchNorm

Build = Callable[..., nn.Module]

PLACEMENTS = ("before", "after")
AS_IS = "as-is"  # leaves a finished network unchanged
UNPLACED = ("none", AS_IS)  # norms that have no layer to place


@dataclass(frozen=True)
class Kind:
    """One entry of the registry."""

    build: Build
    title: str
    replaces_bias: bool
    trial: Callable[..., int]
    target: str | None
    positional: tuple[str, ...]


_REGISTRY: dict[str, Kind] = {}


def _few(*arguments: Any, **options: Any) -> int:
    return 4


def register(
    name: str,
    build: Build,
    *,
    title: str,
    replaces_bias: bool,
    trial: Callable[..., int] = _few,
    target: str | None = None,
    positional: tuple[str, ...] = (),
) -> None:
    """Make a normalization available to comparisons.

    Args:
        name: Its name in `norms=` and `--norms`, without commas, colons and spaces.
        build: `build(num_features, dims, *options, **options)` returns the layer for `dims` = 1, 2 or 3, as in
            `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`. The user writes the options after the name: `ghost:16` calls
            `build(num_features, dims, 16)`, and `renorm:rmax=3,dmax=5` calls
            `build(num_features, dims, rmax=3, dmax=5)`.
        title: Its name in a sentence.
        replaces_bias: Whether it subtracts each channel's mean and adds its own shift, so that a bias right before it
            has no effect.
        trial: `trial(*options, **options)` returns a number of channels that is valid for these options. A layer of
            that size checks the options before any network is built. The default is 4 channels.
        target: Its name in `batchnorm.convert`, if `convert` can insert it into a finished network and keep the
            settings and statistics of the replaced layers. Without a target, `build` makes the new layers.
        positional: Names of the options that can be written without their name, in order. `build` gets them by name.

    Raises:
        ValueError: If the name is taken, or contains a comma, colon or space.
    """
    if name in _REGISTRY or not name or any(mark in name for mark in ",: "):
        raise ValueError(f"a norm needs a free name without commas, colons and spaces, got {name!r}. Choose another.")
    _REGISTRY[name] = Kind(build, title, replaces_bias, trial, target, positional)


def names() -> tuple[str, ...]:
    """Return the name of every registered normalization."""
    return tuple(_REGISTRY)


@dataclass
class Norm:
    """One normalization with its options and its placement, with which models are built.

    A model calls `norm.activated(64)` for a normalization and its activation on `[N, 64]`, or
    `norm.activated(16, dims=2)` on `[N, 16, H, W]`. It calls `norm(16, dims=2)` for a normalization alone.

    Attributes:
        spec: The norm as the user wrote it, such as `batch` or `batch:momentum=0.01`.
        title: Its name in a sentence.
        cancels_bias: Whether a bias right before the layer has no effect.
        build: `build(num_features, dims, *arguments, **options)` returns the layer.
        arguments: Options without a name.
        options: Options by name.
        placement: `before` or `after` the activation.
        target: Its name in `batchnorm.convert`, if it has one.
        drop: Probability with which `dropout` zeroes a value; None for no dropout.
        made: Every layer made so far, in order.
        placed: How many of them were made with an activation.
        dropped: How many dropout layers were made.
    """

    spec: str
    title: str
    cancels_bias: bool
    build: Build
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    placement: str = "before"
    target: str | None = None
    drop: float | None = None
    made: list[nn.Module] = field(default_factory=list, init=False)
    placed: int = field(default=0, init=False)
    dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check the placement."""
        check_among("placement", self.placement, PLACEMENTS)

    @property
    def replaces_bias(self) -> bool:
        """Whether the preceding layer can omit its bias, because the normalization cancels it."""
        return self.cancels_bias and self.placement == "before"

    def __call__(self, num_features: int, dims: int = 1) -> nn.Module:
        """Return a new normalization layer.

        Args:
            num_features: Number of channels C.
            dims: 1 for `[N, C]` and `[N, C, L]`, 2 for `[N, C, H, W]`, 3 for `[N, C, D, H, W]`.
        """
        layer = self.build(num_features, dims, *self.arguments, **self.options)
        self.made.append(layer)
        return layer

    def activated(
        self, num_features: int, activation: Callable[[], nn.Module] = nn.ReLU, dims: int = 1
    ) -> nn.Sequential:
        """Return a new normalization and a new activation, in the order that `placement` specifies.

        The parts are named `norm` and `activation` in either order, so that checkpoints fit both.

        Args:
            num_features: Number of channels C.
            activation: Makes the activation.
            dims: As for the normalization alone.
        """
        parts = [("norm", self(num_features, dims)), ("activation", activation())]
        self.placed += 1
        return nn.Sequential(OrderedDict(parts if self.placement == "before" else reversed(parts)))

    def dropout(self) -> nn.Module:
        """Return a new dropout layer with the probability of the comparison, or an identity if there is none."""
        self.dropped += 1
        return nn.Dropout(self.drop) if self.drop else nn.Identity()

    def forget(self) -> None:
        """Forget the layers made so far, before another network is built."""
        self.made.clear()
        self.placed = self.dropped = 0


def parse(spec: str, placement: str = "before", drop: float | None = None) -> Norm:
    """Return the normalization that `spec` names.

    Args:
        spec: A registered name, followed by a colon and the options, if any.
        placement: `before` or `after` each activation.
        drop: Probability of dropout; None for none.

    Raises:
        ComparisonError: If the name is unknown, the layer does not take the options, or there is no such placement.
    """
    name, _, written = spec.partition(":")
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name.lower(), _REGISTRY, n=1, cutoff=0.4)
        hint = f"Did you mean {close[0]}?" if close else "Choose from these."
        raise ComparisonError(f"norms must be among {', '.join(_REGISTRY)}, got {name!r}. {hint}")
    kind = _REGISTRY[name]
    arguments: list[Any] = []
    options: dict[str, Any] = {}
    for part in filter(None, written.split(",")):
        key, equals, value = part.partition("=")
        if equals:
            options[key] = _literal(value)
        else:
            arguments.append(_literal(part))
    try:
        if kind.positional:
            options = _named(arguments, kind.positional) | options
            arguments = []
        kind.build(kind.trial(*arguments, **options), 1, *arguments, **options)
    except (TypeError, ValueError) as error:
        raise ComparisonError(
            f"the options of norm {spec!r} must be valid for its layer, which raised: {as_clause(error)}. Write "
            f"{name} alone for the defaults."
        ) from error
    return Norm(
        spec, kind.title, kind.replaces_bias, kind.build, tuple(arguments), options, placement, kind.target, drop
    )


def parse_all(specs: str | Iterable[str], placement: str = "before") -> list[Norm]:
    """Return the normalizations that the items of `specs` name. Commas within an item also separate norms.

    A part with `=` and without a colon belongs to the norm before it: `renorm:rmax=3,dmax=5,batch` names two norms.

    Raises:
        ComparisonError: If there is no norm, a norm is repeated, or one is unknown.
    """
    separate: list[str] = []
    for item in [specs] if isinstance(specs, str) else specs:
        first = True
        for part in filter(None, (part.strip() for part in item.split(","))):
            if not first and "=" in part and ":" not in part:
                separate[-1] += f",{part}"
            else:
                separate.append(part)
            first = False
    if not separate:
        raise ComparisonError(f"norms must name at least one of {', '.join(_REGISTRY)}, got none. Name one.")
    for spec in separate:
        if separate.count(spec) > 1:
            raise ComparisonError(f"norms must all differ, got {spec!r} twice. Leave one out.")
    return [parse(spec, placement) for spec in separate]


def _literal(text: str) -> Any:
    """Return the Python value of a literal, or the text itself if it is not one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _named(arguments: list[Any], names: tuple[str, ...]) -> dict[str, Any]:
    if len(arguments) > len(names):
        raise TypeError(f"at most {len(names)} without a name ({', '.join(names)})")
    return dict(zip(names, arguments, strict=False))


class IndivisibleError(ValueError):
    """The number of groups does not divide the channels of a layer.

    Args:
        groups: The number of groups.
        channels: The number of channels of each layer that is to be normalized.

    Attributes:
        groups: As given.
    """

    def __init__(self, groups: int, channels: Iterable[int]) -> None:
        widths = sorted(set(channels))
        # A group of one channel would leave no value of [N, C] but zero.
        fitting = [d for d in range(1, max(widths[0], 2)) if not any(width % d for width in widths)]
        below, above = (d for d in fitting if d < groups), (d for d in fitting if d > groups)
        proposals = [d for d in (max(below, default=None), min(above, default=None)) if d is not None]
        super().__init__(
            f"group normalization expects a number of groups that divides the {_listed(widths)} channels, got "
            f"{groups}. Write {' or '.join(f'group:{d}' for d in proposals)}"
        )
        self.groups = groups


def _listed(widths: list[int]) -> str:
    *others, last = map(str, widths)
    return f"{', '.join(others)} and {last}" if others else last


def _no_norm(num_features: int, dims: int) -> nn.Module:
    return nn.Identity()


def _by_rank(*layers: Build) -> Build:
    """Return a `build` that picks the layer for 1, 2 or 3 dims."""

    def build(num_features: int, dims: int, *arguments: Any, **options: Any) -> nn.Module:
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}. Use 2 for images.")
        return layers[dims - 1](num_features, *arguments, **options)

    return build


def _group_norm(num_features: int, groups: int = 32, **options: Any) -> nn.Module:
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"the number of groups must be a positive integer, got {groups!r}. Write for example group:8")
    if num_features % groups:
        raise IndivisibleError(groups, [num_features])
    return _grouped(groups, num_features, **options)


def _groups(groups: Any = 32, **options: Any) -> int:
    return groups if isinstance(groups, int) else 4


def _layer_norm(num_features: int, **options: Any) -> nn.Module:
    """Return a layer that normalizes each sample over all channels and positions, with γ and β per channel."""
    return _grouped(1, num_features, **options)


def _grouped(groups: int, num_features: int, **options: Any) -> nn.GroupNorm:
    return (_SingleChannels if groups == num_features else nn.GroupNorm)(groups, num_features, **options)


class _SingleChannels(nn.GroupNorm):
    """torch's layer with one channel per group. It refuses one value per group, which it would erase."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:].numel() == 1:
            raise ValueError(
                f"group normalization expects more than one value per group, got {list(input.shape)} with "
                f"{self.num_groups} groups, whose values would be erased. Choose fewer groups, or another norm."
            )
        return super().forward(input)


class _InstanceNorm1d(nn.InstanceNorm1d):
    """torch's layer, except that it refuses `[N, C]`, which torch interprets as one sample with N channels."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 3:
            raise ValueError(
                f"instance normalization expects x of shape [N, C, *S] with positions to normalize over, got "
                f"{list(input.shape)}. Choose another norm for layers without positions."
            )
        return super().forward(input)


def _instance_norm(layer: Build) -> Build:
    def build(num_features: int, **options: Any) -> nn.Module:
        return layer(num_features, **{"affine": True, **options})

    return build


register("none", _no_norm, title="no normalization", replaces_bias=False)
register(AS_IS, _no_norm, title="the network's own normalization", replaces_bias=False)
for _name, _title, _layers, _positional in (
    ("batch", "batch normalization", (BatchNorm1d, BatchNorm2d, BatchNorm3d), ("eps", "momentum")),
    ("renorm", "batch renormalization", (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d), ("rmax", "dmax")),
    ("ghost", "ghost batch normalization", (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d), ("ghost_size",)),
    ("sync", "synchronized batch normalization", (SyncBatchNorm,) * 3, ("eps", "momentum")),
    (
        "decorrelated",
        "decorrelated batch normalization",
        (DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d),
        ("group_size",),
    ),
):
    register(
        _name,
        _by_rank(*_layers),
        title=_title,
        replaces_bias=True,
        target=_layers[0].__name__.removesuffix("1d"),
        positional=_positional,
    )
# A mean over several channels, or of one sample, does not cancel a bias.
register(
    "group",
    _by_rank(*[_group_norm] * 3),
    title="group normalization",
    replaces_bias=False,
    trial=_groups,
    positional=("groups",),
)
register("layer", _by_rank(*[_layer_norm] * 3), title="layer normalization", replaces_bias=False)
register(
    "instance",
    _by_rank(*map(_instance_norm, (_InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))),
    title="instance normalization",
    replaces_bias=True,
)
# There is no entry for frozen normalization, which does nothing before training, nor for domain and conditional
# normalization, which need a domain or a label in addition to x.
