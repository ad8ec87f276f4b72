from __future__ import annotations

import numpy as np

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, layers_listed, named


class BrokenStatistics(Rule):
    code = "BN202"
    title = "statistics or parameters are not finite, or a variance is negative"
    why = """
        NaN or infinity in one batch, or an overflow in half precision, stays in a running average forever. From then
        on, the channel is NaN in evaluation. Training continues and does not show it.
    """
    evidence = "Every running mean, running variance, γ and β: NaN, infinity, a variance below 0."
    severity = "An error: the channel's output in evaluation is NaN or meaningless."
    repair = """
        for found in batchnorm.walk.norm_layers(model):
            found.module.reset_running_stats()  # NaN in γ or β has to be trained again
        model, report = batchnorm.recalibrate(model, training_data)
    """
    repair_keras = """
        model, report = batchnorm.keras.recalibrate(model, training_data)  # NaN in γ or β has to be trained again
    """
    source = """
        PyTorch's documentation of `BatchNorm2d`. `on_nonfinite="skip"` of this library's layers prevents it, and
        `on_nonfinite="error"` reports the first such batch.
    """
    causes = ("BN114",)

    def check(self, m: Measurements) -> Findings:
        broken = {layer.path: number for layer in m.layers if (number := _broken_channels(layer))}
        if broken:
            yield self.finding(
                Severity.ERROR,
                broken,
                f"{counted(sum(broken.values()), 'channel')} of {layers_listed(broken)}",
                evidence=[f"{named(path)}: {counted(number, 'channel')}" for path, number in list(broken.items())[:5]],
                channels=broken,
            )


def _broken_channels(layer: Layer) -> int:
    broken = None
    for name, vector in vars(layer.vectors).items():
        if vector is None:
            continue
        here = ~np.isfinite(vector) | ((vector < 0) if name == "running_var" else False)
        channels = here.reshape(-1, here.shape[-1]).any(0)
        broken = channels if broken is None or broken.shape != channels.shape else broken | channels
    return 0 if broken is None else int(broken.sum())
