"""What every layer of the family shares: its arguments, its buffers, and the call that normalizes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import init

from batchnorm import _checks, functional


class NormLayer(torch.nn.modules.batchnorm._NormBase):
    """Mixed in before one of torch's classes, whose parameters, buffers and `state_dict` it keeps."""

    # The name in error messages; its ending fixes the rank of x. Subclasses of a layer inherit it.
    layer_name: ClassVar[str]

    # On the class, so that layers pickled before an attribute existed, or given this class later, have it.
    on_nonfinite: str = "propagate"
    update_running_stats: bool = True
    activation: str = "none"
    negative_slope: float = 0.01

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        on_nonfinite: str = "propagate",
    ) -> None:
        _checks.check_num_features(self.layer_name, num_features)
        self._check_options(eps, momentum, on_nonfinite)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # set here: older torch has no such argument
            self.register_parameter("bias", None)
        self.on_nonfinite = on_nonfinite

    def _check_options(self, eps: float, momentum: float | None, on_nonfinite: str) -> None:
        _checks.check_eps(self.layer_name, eps)
        _checks.check_momentum(self.layer_name, momentum)
        _checks.check_choice(self.layer_name, "on_nonfinite", on_nonfinite, _checks.ON_NONFINITE)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, and running statistics as new."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def _check_input_dim(self, input: Tensor) -> None:
        _checks.check_input(self.layer_name, input)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y for x of the shape that the layer names; positions where `mask [N, *S]` is 0 do not count."""
        return self._normalize(input, mask=mask)

    def _normalize(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        moves = self.training and self.track_running_stats and self.update_running_stats
        # Module.__getattr__ takes half a microsecond; its dictionaries hold all but parametrized tensors.
        held = {**self._parameters, **self._buffers}
        weight = held["weight"] if "weight" in held else self.weight  # noqa: SIM401  (not looked up in vain)
        bias = held["bias"] if "bias" in held else self.bias  # noqa: SIM401
        running_mean, running_var = held["running_mean"], held["running_var"]
        training = self.training or (running_mean is None and running_var is None)
        if self.training and not moves:
            running_mean = running_var = None
        return functional.batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            self.momentum,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            mask=mask,
            num_batches_tracked=held["num_batches_tracked"] if moves else None,
            on_nonfinite=self.on_nonfinite,
            caller=self.layer_name,
        )

    def extra_repr(self) -> str:
        """Torch's description, and what differs from its defaults."""
        parts = [super().extra_repr()]
        if self.on_nonfinite != "propagate":
            parts.append(f"on_nonfinite={self.on_nonfinite!r}")
        if not self.update_running_stats:
            parts.append("update_running_stats=False")
        return ", ".join(parts)


class LazyNormLayer(NormLayer):
    """Mixed in before one of torch's lazy classes: `num_features` comes from the first batch."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        on_nonfinite: str = "propagate",
    ) -> None:
        self._check_options(eps, momentum, on_nonfinite)
        torch_lazy: Any = super(NormLayer, self)  # its constructor has no num_features
        torch_lazy.__init__(eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.on_nonfinite = on_nonfinite

    def reset_parameters(self) -> None:
        """Nothing while the number of channels is unknown."""
        if self.num_features != 0 and not self.has_uninitialized_params():  # type: ignore[operator]
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Make parameters and buffers for x's channels."""
        self._check_input_dim(input)  # before anything is made from a wrong shape
        super().initialize_parameters(input)  # type: ignore[misc]
