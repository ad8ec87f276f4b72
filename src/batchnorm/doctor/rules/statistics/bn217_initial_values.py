from __future__ import annotations

from batchnorm.doctor.measure.cause import LAGS, kept
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import layers_listed


class InitialValues(Rule):
    code = "BN217"
    title = "too few updates for the momentum"
    why = """
        After n updates, the running statistics still contain the initial values with a weight of (1 - momentum)^n. With
        a small momentum and a short training run, evaluation normalizes by these instead of by statistics of the data.
    """
    evidence = """
        Layers whose initial values have a weight above 5 %, by their momentum and the number of their updates. With
        data: if these are at least half of the layers whose running statistics do not fit the data. Layers that were
        never updated belong to [BN201](bn201.md).

        Keras counts no updates, and a layer of PyTorch may lack `num_batches_tracked`. With data, the weight s of the
        initial values is then estimated from running mean = (1 - s)·mean and running variance = s + (1 - s)·variance:
        the mean and the variance of all channels must give nearly the same s, as must more than half of the layers.
    """
    severity = """
        Decided by the cost of the running statistics against the population's, on the same batches; without data, a
        note.
    """
    repair = """
        model, report = batchnorm.recalibrate(model, training_data)
        for found in batchnorm.walk.norm_layers(model):  # if training continues
            found.module.momentum = 0.1
    """
    repair_keras = """
        model, report = batchnorm.keras.recalibrate(model, training_data)
        model, report = batchnorm.keras.convert(model, momentum=0.9)  # if training continues
    """
    notes = """
        A weight below 5 % takes about 3/momentum updates: 30 with a momentum of 0.1, 3000 with 0.001. A layer
        does not record changes of its momentum, so its present value is used for all updates.
    """
    source = "Ioffe & Szegedy 2015, section 3.1; PyTorch's documentation of `BatchNorm2d`."

    def check(self, m: Measurements) -> Findings:
        if m.misfit is not None and m.misfit.cause.kind == "momentum":
            yield self.finding(**m.misfit.finding)
        if "data" not in m.missing:
            return
        early = {layer: layer.initial_share() for layer in m.measured if not layer.is_new()}
        early = {layer: share for layer, share in early.items() if share > LAGS}
        if early:
            worst = max(early, key=lambda layer: early[layer])
            yield self.finding(
                Severity.NOTE,
                [layer.path for layer in early],
                kept(worst),
                evidence=[layers_listed([layer.path for layer in early])],
                left={layer.path: share for layer, share in early.items()},
            )
