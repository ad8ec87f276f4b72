"""The diagnosis of a Keras model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import keras

from batchnorm._options import checked_integer
from batchnorm.doctor.applying import apply_rules, layers_left_out
from batchnorm.doctor.finding import Finding, NotChecked
from batchnorm.doctor.measure.cause import averaging_by_name
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.measure.measuring import add_effects, add_passes
from batchnorm.doctor.report.diagnosis import Diagnosis
from batchnorm.doctor.rules import Rule, load_rules
from batchnorm.keras.doctor.layers import device_of, dtype_of, layers_of
from batchnorm.keras.doctor.passes import KerasPasses, Loss
from batchnorm.keras.models.batches import Batches, Forward
from batchnorm.keras.models.layers import check_model
from batchnorm.models.execution.progress import bar

_CALLER = "diagnose"


def diagnose(
    model: keras.layers.Layer,
    data: Any = None,
    *,
    loss: Loss | str | None = None,
    forward: Forward | None = None,
    batch_size: int = 32,
    max_samples: int | None = 1000,
    budget: int = 5,
    progress: bool = False,
) -> Diagnosis:
    """Find what is wrong with the batch normalization of a Keras model, with evidence and a fix.

    The rules that need the model and the data alone are those for PyTorch, with the same thresholds and pages. The
    model and the data are only read: variables and the state of random numbers stay unchanged, also after an exception.
    With data, the model runs over them three times, in evaluation: normalized by the batches, by the moving statistics,
    and by the statistics of the whole population. One batch is also run with `training=True`, to see which layers
    train.

    Args:
        model: A built Keras model.
        data: The data that the model is trained on, in the batches of training, as for `recalibrate`. Without data,
            only the model itself is examined.
        loss: `loss(y_true, y_pred)` or the name of a loss of Keras. The target is the second part of a tuple. Without a
            loss, costs are changes of the output, and an effect is at most a warning.
        forward: `forward(model, batch)` calls the model in evaluation and returns its output.
        batch_size: The number of samples in a batch, for data that are arrays.
        max_samples: Stop after the batch that reaches this many samples; None reads all the data.
        budget: Number of further passes over the data to measure the cost of single layers.
        progress: Whether to show a bar on standard error (needs rich).

    Returns:
        The diagnosis: the findings, worst first, and the rules that could not be checked. It prints as a report. Its
        `momentum` attributes are the weight of the new batch, 1 minus Keras's momentum, which is `weight_of_old`.

    Raises:
        TypeError: the model is not a Keras model; data are none of these.
        ValueError: the model has no batch normalization or is not built; an argument is out of range; data are empty.
        ImportError: progress without rich.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(momentum=0.1, name="norm")])
        >>> diagnosis = diagnose(model)
        >>> [(finding.code, finding.summary) for finding in diagnosis.findings if finding.code == "BN204"]
        [('BN204', 'momentum 0.1 (weight of the new batch: 0.9) at 1 layer: norm')]
    """
    found = check_model(_CALLER, model)
    budget = checked_integer(_CALLER, "budget", budget, 0, "0 makes no pass for single layers.")
    batches = None if data is None else Batches(_CALLER, data, batch_size, max_samples)
    layers = layers_of(model, found)
    missing = dict.fromkeys(("trace", "optimizer", "step"), "is not measured for Keras models")
    missing["data"] = "needs data (data=)"
    m = Measurements(
        type(model).__name__,
        layers,
        trains=bool(model.trainable_variables),
        device=device_of(model),
        dtype=dtype_of(model),
        versions={"keras": f"{keras.__version__} ({keras.backend.backend()})"},
        averaged=averaging_by_name(type(model).__name__),
        missing=missing,
    )
    if batches is not None:
        call = None if loss is None else keras.losses.get(loss)
        with bar(_CALLER, progress) as shown:
            passes = KerasPasses(model, found, layers, forward, call, budget, shown)
            passes.first(batches)
            m = replace(add_effects(add_passes(m, passes), passes), domains=None)  # Keras has no layer for domains
    every = load_rules()
    rules = {rule.code: rule for rule in every if rule.repair_keras}
    findings, not_checked = apply_rules(m, rules.values())
    others = [
        NotChecked(rule.code, rule.title, "not applied to Keras models") for rule in every if rule.code not in rules
    ]
    findings = [replace(finding, repair=_repair(rules[finding.code], finding)) for finding in findings]
    return Diagnosis.of(m, findings, [*not_checked, *layers_left_out(m), *others])


def _repair(rule: type[Rule], finding: Finding) -> str:
    """Return the fix for a Keras model, whose functions have the same names."""
    if finding.repair == rule.repair or "torch" in finding.repair:
        return rule.repair_keras
    return re.sub(r"\bbatchnorm\.(freeze|recalibrate)\(", r"batchnorm.keras.\1(", finding.repair)
