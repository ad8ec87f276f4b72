from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.traced import tensor_of
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed, named
from batchnorm.nn.followed import followers
from batchnorm.walk import has_own_forward


class RedundantBias(Rule):
    code = "BN110"
    title = "a bias before batch normalization does nothing"
    why = """
        The bias shifts the mean of the batch, which is subtracted. It costs parameters and optimizer state, and the
        running mean follows it.
    """
    evidence = """
        In the traced model: convolutions, and linear layers of `[N, C]`, with a bias whose result is read by batch
        normalization alone. Layers that do not normalize by the batch in training, and layers with their own
        `forward`, are left out. Without data the model is traced on random input of a common size.
    """
    severity = "Always a note: it does no harm."
    repair = "model, report = batchnorm.drop_redundant_bias(model)  # in training: optimizer=optimizer, inplace=True"
    source = "Ioffe & Szegedy 2015, section 3.2."
    needs = ("trace",)

    def check(self, m: Measurements) -> Findings:
        found = {layer.path: bias for layer in m.layers if (bias := _bias(m, layer)) is not None}
        if not found:
            return
        number = sum(bias.numel() for _, bias in found.values())
        producers = [producer for producer, _ in found.values()]
        yield self.finding(
            Severity.NOTE,
            producers,
            f"{counted(number, 'parameter does', 'parameters do')} nothing, in the bias of {listed(producers)}",
            evidence=[f"{producer} before {named(path)}" for path, (producer, _) in list(found.items())[:5]],
            cost={"parameters": float(number)},
        )


def _bias(m: Measurements, layer: Layer) -> tuple[str, Tensor] | None:
    """Return the path of the layer before it, and its bias."""
    place = layer.place
    if m.trace is None or place is None or not place.follows_linear or place.calls > 1:
        return None
    if not layer.by_batch or (has_own_forward(layer.module) and not followers(layer.module)):
        return None  # perhaps nothing subtracts the bias
    call = place.source
    if call.target is F.linear and not place.channels_last and len(m.trace.shapes.get(call, ())) != 2:
        return None  # its features are not the layer's channels
    bias = tensor_of(call.args[2] if len(call.args) > 2 else call.kwargs.get("bias"), m.trace)
    return None if bias is None else (m.trace.paths.get(call) or call.name, bias)
