"""The calls that folding changes in an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.onnx.graph import Constants, Operator, Parameter
from batchnorm.surgery.fold.states import CannotFold, Linear, Norm, Window

LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_WINDOW = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "output_padding", "output_shape")


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxLinear(Linear):
    """A convolution, transposed convolution, Gemm, or MatMul by a constant.

    Its kind is the type of the node.

    Attributes:
        like: The original constants of the weight and, if there was one, the bias.
    """

    like: tuple[Parameter, Parameter | None]

    @classmethod
    def of(cls, constants: Constants, operator: Operator) -> OnnxLinear:
        """Return the layer that an operator represents.

        Raises:
            CannotFold: Its weight or bias is computed, or it is not linear in its first input.
        """
        op, (_, weight_name, *names) = operator.op, operator.inputs
        if op == "MatMul" and constants.tensor(weight_name) is None:
            raise CannotFold("the weight of the MatMul next to it is computed, or is its left factor")
        like = constants.parameter(weight_name, f"the weight of the {op} next to it")
        bias_like = constants.parameter(names[0], f"the bias of the {op} next to it") if names else None
        layer = cls(
            kind=op,
            weight=like.value,
            bias=None if bias_like is None else bias_like.value,
            groups=operator.attribute("group", 1),
            options={name: value for name in _WINDOW if (value := operator.attribute(name)) is not None},
            transposed=op == "ConvTranspose",
            takes_bias=op != "MatMul",
            like=(like, bias_like),
        )
        if op == "MatMul":
            if layer.dims:
                raise CannotFold("the weight of the MatMul next to it is not a matrix")
            return replace(layer, weight=layer.weight.T)
        return layer._of_gemm(operator) if op == "Gemm" else replace(layer, window=_window(layer.options, layer.dims))

    def _of_gemm(self, operator: Operator) -> OnnxLinear:
        """Return the layer with Gemm's transpositions and factors applied."""
        if operator.attribute("transA", 0):
            raise CannotFold("the Gemm next to it transposes its input")
        transposed = operator.attribute("transB", 0)
        weight = (self.weight if transposed else self.weight.T) * operator.attribute("alpha", 1.0)
        bias = self.bias
        if bias is not None:
            if bias.dim() > 1 and bias.shape[0] != 1:
                raise CannotFold("the bias of the Gemm next to it differs between samples")
            bias = (bias * operator.attribute("beta", 1.0)).reshape(-1).expand(weight.shape[0])
        return replace(self, weight=weight, bias=bias, options={"transB": transposed})

    def after(self, s: ScaleShift) -> OnnxLinear:
        """Return the layer followed by this scale and shift `[out]`, without a bias if it needs none."""
        result = super().after(s)
        return replace(result, bias=None) if self.bias is None and not s.shifts else result


def _window(options: Mapping[str, Any], dims: int) -> Window:
    auto, pads = options.get("auto_pad", "NOTSET"), options.get("pads", (0,) * 2 * dims)
    padding = None
    if not auto.startswith("SAME"):
        padding = ((0, 0),) * dims if auto == "VALID" else tuple(zip(pads[:dims], pads[dims:], strict=True))
    stride, dilation = (tuple(options.get(name, (1,) * dims)) for name in ("strides", "dilations"))
    return Window(stride, dilation, padding, any(options.get("output_padding", ())) or "output_shape" in options)


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxNorm(Norm):
    """Batch normalization with fixed statistics.

    Attributes:
        like: The original constants of its scale, bias, mean and variance.
    """

    like: tuple[Parameter, ...]

    @classmethod
    def of(cls, constants: Constants, operator: Operator) -> OnnxNorm:
        """Return the batch normalization that an operator represents.

        Raises:
            CannotFold: It uses the batch's statistics, or its tensors are computed or not finite.
        """
        if operator.attribute("training_mode", 0) or len(operator.outputs) != 1:
            raise CannotFold("it uses the batch's statistics: it is in training mode")
        if not operator.attribute("spatial", 1):
            raise CannotFold("it has separate statistics for every position (spatial=0)")
        _, *names = operator.node.input
        like = tuple(
            constants.parameter(name, f"its {what}")
            for name, what in zip(names, ("scale", "bias", "mean", "variance"), strict=True)
        )
        scale, bias, mean, var = (parameter.value for parameter in like)
        s = ScaleShift.of(mean, var, scale, bias, float(operator.attribute("epsilon", 1e-5)))
        return cls(scale_shift=s, like=like)
