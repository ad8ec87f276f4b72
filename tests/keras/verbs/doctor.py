"""Cases of `diagnose`: a planted fault and a healthy model for each rule that applies to Keras models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.doctor.report.plain import facts_as_text
from batchnorm.keras.doctor import diagnose
from batchnorm.keras.models.layers import as_numpy, norm_layers
from batchnorm.keras.recalibration import recalibrate
from tests.keras.verbs.models import EVERY_CASE, chosen, normal, outputs

GENERATOR = np.random.default_rng(0)
CLASSES = 4
CENTERS = GENERATOR.normal(size=(CLASSES, 6)).astype(np.float32) * 2.0


def data(batches: int = 8, size: int = 96, *, scale: float = 1.0, ordered: bool = False) -> list[Any]:
    """Return batches of points near one center for each class, sorted by class if `ordered`."""
    generator = np.random.default_rng(1)
    target = generator.integers(0, CLASSES, batches * size)
    target = np.sort(target) if ordered else target
    x = scale * (CENTERS[target] + generator.normal(size=(len(target), 6)))
    return [(x[i : i + size].astype(np.float32), target[i : i + size]) for i in range(0, len(x), size)]


def network(**options: Any) -> Any:
    """Return a classifier with calibrated statistics, whose last layer fits the centers."""
    momentum, epsilon = options.get("momentum", 0.9), options.get("epsilon", 1e-3)
    norm = {"momentum": momentum, "epsilon": epsilon}
    model = keras.Sequential(
        [
            layers.Input((6,)),
            layers.Dense(24, name="first"),
            layers.BatchNormalization(name="norm1", **norm),
            layers.ReLU(),
            layers.Dense(24, name="second"),
            layers.BatchNormalization(name="norm2", momentum=momentum),
            layers.ReLU(),
            layers.Dense(CLASSES, name="last"),
        ]
    )
    generator = np.random.default_rng(2)
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            layer.kernel.assign(generator.normal(size=layer.kernel.shape) / np.sqrt(layer.kernel.shape[0]))
    for found in norm_layers(model):
        found.module.gamma.assign(generator.uniform(0.8, 1.2, 24))
        found.module.beta.assign(generator.uniform(-0.2, 0.2, 24))
    model = recalibrate(model, data()).model
    x, target = (np.concatenate(parts) for parts in zip(*data(), strict=True))
    (features,) = outputs(keras.Model(model.inputs, model.layers[-2].output), [x])
    design = np.concatenate([features, np.ones((len(x), 1))], 1)
    weights = np.linalg.lstsq(design, 3.0 * np.eye(CLASSES)[target] - 1.5, rcond=None)[0]
    model.layers[-1].kernel.assign(weights[:-1])
    model.layers[-1].bias.assign(weights[-1])
    return model


def loss(target: Any, output: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(target, output, from_logits=True)


def stale(model: Any) -> Any:
    generator = np.random.default_rng(3)
    for found in norm_layers(model):
        found.module.moving_mean.assign(as_numpy(found.module.moving_mean) + 2.0 * generator.normal(size=24))
        found.module.moving_variance.assign(as_numpy(found.module.moving_variance) * np.exp(generator.normal(size=24)))
    return model


def assigned(model: Any, name: str, values: Any) -> Any:
    getattr(model.get_layer("norm1"), name).assign(values)
    return model


def half_frozen(model: Any) -> Any:
    for variable in (model.get_layer("norm1").gamma, model.get_layer("norm1").beta):
        variable.trainable = False
    return model


def constant(model: Any) -> Any:
    kernel = as_numpy(model.get_layer("first").kernel)
    kernel[:, :3] = 0.0
    model.get_layer("first").kernel.assign(kernel)
    return model


PLANTED = {
    "BN101": lambda: (stale(network()), data(), "warning"),
    "BN102": lambda: (stale(network()), data(), "warning"),
    "BN103": lambda: (network(), data(scale=5.0), "note"),
    "BN104": lambda: (network(), data(32, 3), "note"),
    "BN105": lambda: (network(), data(ordered=True), "note"),
    "BN107": lambda: (half_frozen(network()), data(), "warning"),
    "BN201": lambda: (new_statistics(network()), data(), "note"),
    "BN202": lambda: (assigned(network(), "moving_mean", np.full(24, np.nan)), None, "error"),
    "BN204": lambda: (network(momentum=0.1), data(12, 48), "warning"),
    "BN205": lambda: (network(epsilon=1e-9), None, "note"),
    "BN206": lambda: (assigned(network(), "gamma", [0.0] * 12 + [1.0] * 12), None, "note"),
    "BN210": lambda: (constant(network()), data(), "note"),
    "BN211": lambda: (assigned(network(), "gamma", np.full(24, 1e6)), None, "note"),
    "BN217": lambda: (too_few_updates(network(momentum=0.999)), data(), "error"),
}
SEVERITIES = ["note", "warning", "error"]


def new_statistics(model: Any) -> Any:
    return assigned(assigned(model, "moving_mean", np.zeros(24)), "moving_variance", np.ones(24))


def too_few_updates(model: Any) -> Any:
    for found in norm_layers(model):
        found.module.moving_mean.assign(np.zeros(24))
        found.module.moving_variance.assign(np.ones(24))
    for x, _ in data():
        model(x, training=True)
    return model


@pytest.mark.parametrize("code", chosen(PLANTED, ["BN101", "BN102", "BN104", "BN107", "BN204", "BN205", "BN206"]))
def test_a_planted_fault_is_found_with_a_fix_for_keras(code: str) -> None:
    model, batches, least = PLANTED[code]()
    diagnosis = diagnose(model, batches, loss=loss)
    found = {finding.code: finding for finding in diagnosis.findings}
    assert code in found, str(diagnosis)
    assert found[code].severity.label in SEVERITIES[SEVERITIES.index(least) :]
    assert "torch" not in found[code].repair and "found.module" not in found[code].repair
    assert found[code].repair.replace("batchnorm.keras.", "").count("batchnorm.") == 0


@pytest.mark.skipif(not EVERY_CASE, reason="the same on every backend")
def test_too_few_updates_explain_the_evaluation_loss() -> None:
    first = diagnose(too_few_updates(network(momentum=0.999)), data(), loss=loss).findings[0]
    assert first.code == "BN217" and "keeps about 99% of the initial running statistics (estimated" in first.summary


def test_a_healthy_model_has_no_finding_and_stays_as_it_is() -> None:
    model = network()
    before = [as_numpy(variable) for variable in model.variables]
    diagnosis = diagnose(model, data(), loss=loss)
    assert not diagnosis.findings, str(diagnosis)
    assert diagnosis.samples == 768 and diagnosis.batches == 8 and diagnosis.model == "Sequential"
    assert [facts.kind for facts in diagnosis.layers] == ["BatchNormalization"] * 2
    assert all(measures.divergence < 0.01 and measures.noise < 0.25 for measures in diagnosis.measures)
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(as_numpy(variable), value)


@pytest.mark.skipif(not EVERY_CASE, reason="the same on every backend")
def test_the_reports_are_those_for_pytorch() -> None:
    diagnosis = diagnose(stale(network()), data(), loss=loss)
    assert "norm1" in str(diagnosis) and diagnosis.to_dict()["findings"][0]["code"] in ("BN101", "BN102")
    (facts, _) = facts_as_text(diagnosis.layers)
    assert facts["momentum"] == "0.9" and "γ" in facts
    assert not {"after", "before", "foldable", "updates"} & set(facts)  # unknown for Keras models
    pytest.importorskip("jinja2")
    assert "norm1" in diagnosis.to_html()


@pytest.mark.skipif(not EVERY_CASE, reason="the same on every backend")
def test_a_recalibrated_model_is_healthy_again() -> None:
    fixed = recalibrate(stale(network()), data()).model
    assert not diagnose(fixed, data(), loss=loss).findings


class FineTuned(keras.Model):
    """A model that calls its base in evaluation, in training too."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = network(), layers.Dense(8)
        self.norm = layers.BatchNormalization(name="trains")

    def call(self, x: Any, training: Any = None) -> Any:
        """Return the result."""
        return self.norm(self.head(self.base(x, training=False)), training=training)


def test_layers_that_run_in_evaluation_while_others_train_are_seen() -> None:
    model = FineTuned()
    model(data()[0][0])
    (finding,) = (finding for finding in diagnose(model, data()).findings if finding.code == "BN107")
    assert finding.severity.label == "note" and len(finding.paths) == 2
    assert all(path.endswith(("norm1", "norm2")) for path in finding.paths)
    assert "batchnorm.keras.recalibrate" in finding.repair


def test_random_numbers_continue_as_without_a_diagnosis() -> None:
    first, second = (
        keras.Sequential([layers.Input((4,)), layers.Dropout(0.5, seed=3), layers.BatchNormalization()])
        for _ in range(2)
    )
    diagnose(first, [normal(8, 4)])
    x = normal(8, 4, seed=1)
    assert np.array_equal(as_numpy(first(x, training=True)), as_numpy(second(x, training=True)))


def test_diagnose_refuses_what_it_cannot_use() -> None:
    for arguments, message in (({"budget": -1}, "budget >= 0"), ({"data": []}, "at least one batch")):
        with pytest.raises(ValueError, match=message):
            diagnose(network(), **arguments)
