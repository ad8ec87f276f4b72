"""BN110: a bias that batch normalization subtracts again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class RedundantBias(Rule):
    """Of a convolution or linear layer whose result goes to batch normalization alone."""

    code = "BN110"
    title = "a bias before batch normalization does nothing"
    why = (
        "It moves the batch's mean, which is subtracted. It costs parameters and optimizer state, and the running "
        "mean follows it."
    )
    repair = "model, report = batchnorm.drop_redundant_bias(model)  # with an optimizer: optimizer=..., inplace=True"
    needs = ("trace",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """In the traced model."""
        found = {layer.path: bias for layer in probe.layers if (bias := _bias(probe, layer)) is not None}
        if not found:
            return
        number = sum(bias[1].numel() for bias in found.values())
        paths = [producer for producer, _ in found.values()]
        yield self.finding(
            Severity.NOTE,
            paths,
            f"{counted(number, 'parameter that does', 'parameters that do')} nothing, in the bias of {listed(paths)}",
            evidence=[f"{producer} before {path or '(model)'}" for path, (producer, _) in list(found.items())[:5]],
            cost={"parameters": float(number)},
        )


def _bias(probe: Probe, layer: Layer) -> tuple[str, Tensor] | None:
    """The producer's path and its bias."""
    place = layer.place
    if probe.trace is None or place is None or not place.follows_linear or place.calls > 1 or not layer.by_batch:
        return None
    call = place.source
    if call.target is F.linear and len(probe.trace.shapes.get(call, ())) != 2:
        return None  # its features are not the layer's channels
    bias = probe.tensor(call.args[2] if len(call.args) > 2 else call.kwargs.get("bias"))
    return None if bias is None else (probe.trace.paths.get(call) or call.name, bias)
