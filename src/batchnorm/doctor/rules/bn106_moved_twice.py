"""BN106: running statistics that move more than once in a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

# Error of the running mean, in standard deviations, that the further updates may add before they are more than a note.
_MATTERS = 0.05


class MovedTwice(Rule):
    """Counted in a training step, which is undone."""

    code = "BN106"
    title = "running statistics move more than once in a training step"
    why = (
        "Activation checkpointing runs a layer again in the backward pass, and a loss that calls the model twice runs "
        "all of them twice. Each time the statistics move, so that the momentum is not the one that was chosen."
    )
    repair = "model, report = batchnorm.accelerate(model)  # its layers do not move in a backward pass"
    needs = ("step",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """In the backward pass, or by several calls of the model."""
        step = probe.step
        assert step is not None
        again = [(layer, step.backward[number]) for number, layer in enumerate(probe.layers) if step.backward[number]]
        if again:
            layers = [layer for layer, _ in again]
            yield self.finding(
                self._severity(probe, layers, 1 + max(times for _, times in again)),
                [layer.path for layer in layers],
                f"the backward pass moves the running statistics of {counted(len(layers), 'layer')} once more: "
                + listed(layer.path for layer in layers),
                evidence=[self._momentum(layers[0], 1 + again[0][1])],
                updates={layer.path: 1 + times for layer, times in again},
            )
        if step.model_calls > 1:
            layers = [layer for number, layer in enumerate(probe.layers) if step.forward[number] > 1]
            if layers:
                yield self.finding(
                    self._severity(probe, layers, step.model_calls),
                    [layer.path for layer in layers],
                    f"a step calls the model {step.model_calls} times, and "
                    f"{counted(len(layers), 'layer moves', 'layers move')} each time",
                    evidence=[self._momentum(layers[0], step.model_calls)],
                    repair="model, report = batchnorm.accelerate(model)  # to layers that can be told not to count\n"
                    "with batchnorm.update_running_stats(model, False):  # around the passes that shall not count\n"
                    "    ...",
                    calls=step.model_calls,
                )

    @staticmethod
    def _momentum(layer: Layer, times: int) -> str:
        momentum = getattr(layer.module, "momentum", None)
        if momentum is None:
            return "with momentum=None each batch counts more than once in the average"
        return f"momentum {momentum:g} acts as {1 - (1 - momentum) ** times:.3g}"

    @staticmethod
    def _severity(probe: Probe, layers: list[Layer], times: int) -> Severity:
        added = [_added_error(layer, times, probe.batch_size) for layer in layers]
        known = [error for error in added if error is not None]
        return Severity.WARNING if known and median(known) > _MATTERS else Severity.NOTE


def _added_error(layer: Layer, times: int, batch_size: float) -> float | None:
    """By how much the running mean scatters more, in standard deviations."""
    momentum = getattr(layer.module, "momentum", None)
    if momentum is None or layer.samples is None or layer.population is None:
        return None
    scatter = (layer.samples.error_of_mean(batch_size) / (layer.population.var + layer.eps)).mean().sqrt()
    often = 1 - (1 - momentum) ** times
    return float(scatter) * (math.sqrt(often / (2 - often)) - math.sqrt(momentum / (2 - momentum)))
