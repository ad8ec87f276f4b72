"""The base of every layer of this library: arguments, buffers, and the call that normalizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import init

from batchnorm import _checks, _options, functional
from batchnorm.ops import strict

Check = Callable[[str, Any], object]


def one_of(name: str, choices: Collection[str]) -> Check:
    """Return a check that an attribute is one of the choices."""
    return lambda caller, value: _options.check_choice(caller, name, value, choices)


class NormLayer(torch.nn.modules.batchnorm._NormBase):
    """A mixin, listed before one of torch's classes; it keeps their parameters, buffers and `state_dict`."""

    # The name in error messages. A final 1d, 2d or 3d determines the rank of x. Users' subclasses inherit the name.
    layer_name: ClassVar[str]

    # The checks of attributes, which may also be set after construction. In evaluation, eps may be zero.
    _checked: ClassVar[Mapping[str, Check]] = {
        "eps": partial(_options.check_eps, zero_allowed=True),
        "momentum": _options.check_momentum,
        "on_nonfinite": one_of("on_nonfinite", _options.ON_NONFINITE),
        "on_single": one_of("on_single", _options.ON_SINGLE),
        "channel_dim": _checks.check_channel_dim,
    }

    # Whether the layer normalizes by the running statistics even in training.
    _frozen: ClassVar[bool] = False

    # Class attributes, so that layers have them even if they were pickled by an older version or converted.
    on_nonfinite: str = "propagate"
    on_single: str = "error"
    channel_dim: int = 1
    update_running_stats: bool = True
    activation: str = "none"
    negative_slope: float = 0.01
    alpha: float = 1.0

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
    ) -> None:  # fmt: skip
        hint = "Pass the number of channels C of its input."
        num_features = _options.checked_integer(self.layer_name, "num_features", num_features, 0, hint)
        self._check_options(eps, track_running_stats, on_single)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._set_options(bias, on_nonfinite, on_single, channel_dim)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, after checking its value as the constructor does."""
        if name in self._checked:
            self._checked[name](self.layer_name, value)
        super().__setattr__(name, value)

    def _set_options(self, bias: bool, on_nonfinite: str, on_single: str, channel_dim: int) -> None:
        if not bias:  # set here, because older torch has no such argument
            self.register_parameter("bias", None)
        self.on_nonfinite = on_nonfinite
        self.on_single = on_single
        self.channel_dim = channel_dim

    def _check_options(self, eps: float, track_running_stats: bool, on_single: str) -> None:
        """Refuse eps=0, which `__setattr__` accepts, and options that contradict each other."""
        _options.check_eps(self.layer_name, eps)
        if on_single == "running" and not track_running_stats:
            raise ValueError(
                f"{self.layer_name} expects track_running_stats=True with on_single='running', got False. The running "
                "statistics normalize a batch with one value per channel: keep them, or use on_single='error'."
            )

    def reset_parameters(self) -> None:
        """Set γ to 1, β to 0, and the running statistics to their initial values."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def _check_input_dim(self, input: Tensor) -> None:
        _checks.check_input(self.layer_name, input, self.channel_dim)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y for x of the layer's shape; positions where `mask [N, *S]` is 0 do not enter the statistics."""
        return self._normalize(input, mask=mask)

    @property
    def _updates_running(self) -> bool:
        """Whether this call updates the running statistics."""
        return self.training and self.track_running_stats and self.update_running_stats and not self._frozen

    def _normalize(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: tuple[str, float] | None = None,
    ) -> Tensor:
        """Normalize, add the residual, and apply the activation: the given name and parameter, or the layer's own."""
        # Module.__getattr__ takes half a microsecond. The dictionaries hold all tensors except parametrized ones.
        parameters, buffers = self._parameters, self._buffers
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401  (avoids a lookup)
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if "running_mean" in buffers and "running_var" in buffers:
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        else:
            running_mean, running_var = self.running_mean, self.running_var
        training = not self._frozen and (self.training or (running_mean is None and running_var is None))
        updates = training and self.training and self.track_running_stats and self.update_running_stats
        if training and not updates and self.on_single == "error":
            running_mean = running_var = None
        if activation is None:
            name, negative_slope, alpha = self.activation, self.negative_slope, self.alpha
        else:
            name, negative_slope = activation
            alpha = negative_slope
        counter = buffers["num_batches_tracked"] if updates else None
        if mask is None:  # first, because it takes less time than the call below
            y = strict.batch_norm(
                x, running_mean, running_var, weight, bias, training, updates, self.momentum, self.eps, name,
                negative_slope, alpha, residual, counter, self.on_nonfinite, self.on_single, self.channel_dim,
                self.layer_name,
            )  # fmt: skip
            if y is not None:
                return y
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, training, self.momentum, self.eps,
            activation=name, negative_slope=negative_slope, alpha=alpha, residual=residual, mask=mask,
            num_batches_tracked=counter,
            on_nonfinite=self.on_nonfinite, on_single=self.on_single,
            update_running_stats=updates, channel_dim=self.channel_dim, caller=self.layer_name,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Describe the layer: torch's description, and the options that differ from their defaults."""
        parts = [super().extra_repr()]
        if self.on_nonfinite != "propagate":
            parts.append(f"on_nonfinite={self.on_nonfinite!r}")
        if self.on_single != "error":
            parts.append(f"on_single={self.on_single!r}")
        if self.channel_dim != 1:
            parts.append(f"channel_dim={self.channel_dim}")
        if not self.update_running_stats:
            parts.append("update_running_stats=False")
        return ", ".join(parts)


def channels_second(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """Return the input of any batch normalization, of torch or of this library, as a view `[N, C, *S]`."""
    return functional.channels_second(x, getattr(layer, "channel_dim", 1))


class LazyNormLayer(NormLayer):
    """A mixin before one of torch's lazy classes: `num_features` comes from the first batch."""

    def __init__(
        self, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True,
        device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
    ) -> None:  # fmt: skip
        self._check_options(eps, track_running_stats, on_single)
        torch_lazy: Any = super(NormLayer, self)  # its constructor has no num_features
        torch_lazy.__init__(eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._set_options(bias, on_nonfinite, on_single, channel_dim)

    def reset_parameters(self) -> None:
        """Reset the parameters if the number of channels is known."""
        if self.num_features != 0 and not self.has_uninitialized_params():  # type: ignore[operator]
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Create parameters and buffers for x's channels."""
        if isinstance(input, Tensor) and input.is_nested:
            functional.check_jagged(self.layer_name, input, self.channel_dim)
            input = input.values().unsqueeze(0)
        self._check_input_dim(input)  # before anything is created from a wrong shape
        super().initialize_parameters(functional.channels_second(input, self.channel_dim))  # type: ignore[misc]
