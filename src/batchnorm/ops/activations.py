"""The activations that an operator can apply after normalization.

`ACTIVATIONS` has one row for each: its function, its derivative, and its names in torch. Graph rewriting, the layers
and the tests read this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.ops.reduce import SERIAL

_aten = torch.ops.aten


def _in_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply an elementwise function so that its bits do not depend on the number of CPU threads.

    torch's exp and erf round differently at the end of a thread's share than inside it. Fixed blocks make the result
    independent of the threads. +, ×, max and comparisons always round alike, so functions of these need no blocks.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return function(*tensors)  # a compiled or exported graph must not depend on the size
    if tensors[0].numel() <= SERIAL or tensors[0].device.type != "cpu":
        return function(*tensors)
    blocks = zip(*(t.flatten().split(SERIAL) for t in tensors), strict=True)
    return torch.cat([function(*block) for block in blocks]).reshape(tensors[0].shape)


class Spelling(NamedTuple):
    """One name of an activation in torch.

    Attributes:
        name: The name of functions, methods and aten operators, without the underscore of the in-place form.
        module: The module class.
        arguments: The arguments after the input, except `inplace`, with their defaults, in order.
        required: The values that some arguments must have, because others give another function.
        same_gradient: Whether the derivative is the same at kinks, too.
    """

    name: str
    module: type[nn.Module] | None = None
    arguments: Mapping[str, Any] = {}
    required: Mapping[str, Any] = {}
    same_gradient: bool = True


class Activation(NamedTuple):
    """One activation: `y = forward(z, parameter)` and `dz = backward(dy, t, parameter)`.

    Attributes:
        forward: The function.
        backward: The derivative times dy. At kinks, it equals torch's.
        formula: f(z) in Markdown, for the documentation.
        spellings: Its names in torch; torch's function of the same name comes first.
        kinks: The points where the derivative jumps.
        from_output: Whether t may be y instead of z. The derivative is then constant between kinks.
        parameter: Its keyword argument: "negative_slope", "alpha" or None.
    """

    forward: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]
    formula: str
    spellings: tuple[Spelling, ...] = ()
    kinks: tuple[float, ...] = ()
    from_output: bool = False
    parameter: str | None = None

    @property
    def default(self) -> float:
        """The parameter's default; 0 if there is no parameter."""
        return 0.0 if self.parameter is None else float(self.spellings[0].arguments[self.parameter])


def _clamp(low: float | None, high: float | None) -> tuple[Spelling, ...]:
    """Return the spellings of a clamp. It passes the gradient at its bounds; relu and relu6 do not."""
    bounds = {"min": None, "max": None}
    return tuple(Spelling(name, None, bounds, {"min": low, "max": high}, False) for name in ("clamp", "clip"))


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda z, _: z, lambda dy, t, _: dy, "z", from_output=True),
    "relu": Activation(
        lambda z, _: F.relu(z),
        lambda dy, t, _: _aten.threshold_backward(dy, t, 0.0),
        "max(z, 0)",
        (Spelling("relu", nn.ReLU), *_clamp(0.0, None)),
        kinks=(0.0,),
        from_output=True,
    ),
    "relu6": Activation(
        lambda z, _: F.relu6(z),
        lambda dy, t, _: _aten.hardtanh_backward(dy, t, 0.0, 6.0),
        "min(max(z, 0), 6)",
        (
            Spelling("relu6", nn.ReLU6),
            Spelling("hardtanh", nn.Hardtanh, {"min_val": -1.0, "max_val": 1.0}, {"min_val": 0.0, "max_val": 6.0}),
            *_clamp(0.0, 6.0),
        ),
        kinks=(0.0, 6.0),
        from_output=True,
    ),
    "leaky_relu": Activation(
        lambda z, slope: F.leaky_relu(z, slope),
        # False means that t is z. It may also be y, which has z's sign if the slope is positive.
        lambda dy, t, slope: _aten.leaky_relu_backward(dy, t, slope, False),
        "z for z > 0, else `negative_slope`·z",
        (Spelling("leaky_relu", nn.LeakyReLU, {"negative_slope": 0.01}),),
        kinks=(0.0,),
        from_output=True,
        parameter="negative_slope",
    ),
    "silu": Activation(
        lambda z, _: _in_blocks(F.silu, z),
        lambda dy, t, _: _in_blocks(_aten.silu_backward, dy, t),
        "z·σ(z) with σ(z) = 1/(1 + e⁻ᶻ)",
        (Spelling("silu", nn.SiLU),),
    ),
    "gelu": Activation(
        lambda z, _: _in_blocks(F.gelu, z),
        lambda dy, t, _: _in_blocks(_aten.gelu_backward, dy, t),
        "z·Φ(z) with the exact normal distribution Φ",
        (Spelling("gelu", nn.GELU, {"approximate": "none"}, {"approximate": "none"}),),
    ),
    "hardswish": Activation(
        lambda z, _: F.hardswish(z),
        lambda dy, t, _: _aten.hardswish_backward(dy, t),
        "z·min(max(z + 3, 0), 6)/6",
        (Spelling("hardswish", nn.Hardswish),),
        kinks=(-3.0, 3.0),
    ),
    "mish": Activation(
        lambda z, _: _in_blocks(F.mish, z),
        lambda dy, t, _: _in_blocks(_aten.mish_backward, dy, t),
        "z·tanh(log(1 + eᶻ))",
        (Spelling("mish", nn.Mish),),
    ),
    "hardsigmoid": Activation(
        # torch's own derivative multiplies by a float32 1/6, even for float64.
        lambda z, _: F.relu6(z + 3.0) / 6.0,
        lambda dy, t, _: torch.where((t > -3.0) & (t < 3.0), dy / 6.0, 0.0),
        "min(max(z + 3, 0), 6)/6",
        (Spelling("hardsigmoid", nn.Hardsigmoid),),
        kinks=(-3.0, 3.0),
    ),
    "tanh": Activation(
        lambda z, _: _in_blocks(torch.tanh, z),
        lambda dy, t, _: _in_blocks(lambda dy, z: _aten.tanh_backward(dy, torch.tanh(z)), dy, t),
        "tanh(z)",
        (Spelling("tanh", nn.Tanh),),
    ),
    "sigmoid": Activation(
        lambda z, _: _in_blocks(torch.sigmoid, z),
        lambda dy, t, _: _in_blocks(lambda dy, z: _aten.sigmoid_backward(dy, torch.sigmoid(z)), dy, t),
        "σ(z)",
        (Spelling("sigmoid", nn.Sigmoid),),
    ),
    "elu": Activation(
        lambda z, alpha: _in_blocks(lambda z: F.elu(z, alpha), z),
        lambda dy, t, alpha: _in_blocks(lambda dy, z: _aten.elu_backward(dy, alpha, 1.0, 1.0, False, z), dy, t),
        "z for z > 0, else `alpha`·(eᶻ − 1)",
        (
            # The operator in an exported program has two more scales than the function.
            Spelling(
                "elu", nn.ELU, {"alpha": 1.0, "scale": 1.0, "input_scale": 1.0}, {"scale": 1.0, "input_scale": 1.0}
            ),
        ),
        kinks=(0.0,),
        parameter="alpha",
    ),
}

_Entry = tuple[str, Activation, Spelling]
_BY_NAME: dict[str, list[_Entry]] = {}
_BY_MODULE: dict[type[nn.Module], list[_Entry]] = {}
_NAMES: dict[Any, str] = {}
for _entry in [(name, entry, spelling) for name, entry in ACTIVATIONS.items() for spelling in entry.spellings]:
    _spelling = _entry[2]
    _BY_NAME.setdefault(_spelling.name, []).append(_entry)
    if _spelling.module is not None:
        _BY_MODULE.setdefault(_spelling.module, []).append(_entry)
    for _name in (_spelling.name, f"{_spelling.name}_"):
        _NAMES |= {getattr(source, _name): _spelling.name for source in (torch, F) if hasattr(source, _name)}


def known_from_output(activation: str, parameter: float) -> bool:
    """Return whether the derivative can be computed from y, so that backward does not need the residual."""
    return ACTIVATIONS[activation].from_output and (activation != "leaky_relu" or parameter > 0.0)


def parameter_of(activation: str, **parameters: float) -> float:
    """Return the value of the activation's parameter, or 0 if it has none."""
    name = ACTIVATIONS[activation].parameter
    return 0.0 if name is None else parameters[name]


def called_activation(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, gradients: bool = True
) -> tuple[str, float] | None:
    """Return the name and the parameter of the activation that a call applies, or None for any other call.

    Args:
        target: A function, the name of a method, or an aten operator.
        args: The positional arguments after the input.
        kwargs: The named arguments.
        gradients: Whether the derivative must be the same at kinks, too.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname if target.namespace == "aten" else ""
    else:
        name = target if isinstance(target, str) else _NAMES.get(target, "")
    values = [argument for argument in args if not isinstance(argument, bool)]  # True and False are `inplace`
    options = {key: value for key, value in kwargs.items() if key != "inplace"}
    for entry in _BY_NAME.get(name.removesuffix("_"), ()):
        spelling = entry[2]
        arguments = spelling.arguments
        if len(values) <= len(arguments) and options.keys() <= arguments.keys():
            given = {**arguments, **dict(zip(arguments, values, strict=False)), **options}
            if (spelling.same_gradient or not gradients) and (found := _match(entry, given)):
                return found
    return None


def module_activation(module: nn.Module) -> tuple[str, float] | None:
    """Return the name and the parameter of the activation that a module applies, or None for any other module."""
    for entry in _BY_MODULE.get(type(module), ()):
        given = {name: getattr(module, name, default) for name, default in entry[2].arguments.items()}
        if found := _match(entry, given):
            return found
    return None


def _match(entry: _Entry, given: Mapping[str, Any]) -> tuple[str, float] | None:
    name, activation, spelling = entry
    if any(given[argument] != value for argument, value in spelling.required.items()):
        return None
    parameter = given.get(activation.parameter, 0.0)  # type: ignore[arg-type]
    return (name, float(parameter)) if isinstance(parameter, (int, float)) else None
