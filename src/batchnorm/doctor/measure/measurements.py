"""The measurements of a model, which the rules read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from batchnorm.doctor.finding import Severity
from batchnorm.doctor.measure.cause import Misfit
from batchnorm.doctor.measure.distance import Distance
from batchnorm.doctor.measure.domains import Domains
from batchnorm.doctor.measure.effect import OUTPUT_MATTERS, Effect
from batchnorm.doctor.measure.independence import Independence
from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.padding import PaddingEffect
from batchnorm.doctor.measure.processes import ProcessStates
from batchnorm.doctor.measure.training_step import TrainingStep
from batchnorm.doctor.wording import DATASET, EXAMPLE


@dataclass(frozen=True)
class Measurements:
    """The measurements of a model. A missing measurement is None or empty, and `missing` has the reason.

    Attributes:
        model: The class of the user's model, without wrappers.
        layers: Every layer of batch normalization, in the model's order.
        training: Whether the model is in training mode.
        trains: Whether any parameter requires a gradient.
        device: The device of the model; all of them if there are several.
        dtype: The dtype of its parameters and statistics; all of them if there are several.
        versions: The versions of its framework, by the framework's name.
        averaged: Why its weights are known to be averages; empty if they are not.
        optimizer_code: Code that makes the user's optimizer without weight decay of batch normalization; None if no
            optimizer was given.
        missing: The needs of rules that are not met, with the reason.
        processes: Number of processes that train the model together.
        process_states: The layers of each process.
        samples: Number of samples.
        batch_sizes: The size of each batch.
        loss: Whether there are data and a loss.
        loss_source: Where the loss comes from, or why there is none, if the user gave none.
        step: A training step on the first batch.
        dropout: The probability of dropout right before a layer in the trace, by the layer's path.
        evaluated_in_training: Paths of the layers that the user's evaluation runs in training mode.
        left_in_training: Paths of the layers that are in training mode after `model.eval()`.
        gap: Effect of the running statistics against the batches', that is, of evaluation against training.
        training_mode_effect: Effect of the batches' statistics against the running ones, that is, of evaluation in
            training mode.
        running_effect: Effect of the running statistics against the population's.
        batch_effect: Effect of the batches' statistics against the population's.
        distances: Distance of the running statistics from the population's, for each layer that can be compared.
        misfit: The layers that are off, and the cause; None if no layer is.
        noise: Standard deviation of a normalized value when the rest of its batch varies, for the median channel, by
            the layer's path.
        dropout_scale: Deviation of a layer's input in training over its deviation without dropout, by the layer's path,
            for layers in which the two differ.
        independence: Test of whether the batches are independent samples.
        domains: The domains that the batches come from in turn; None if there is only one.
        pooled_calls: Effect of common statistics against statistics for each call, for layers that are called several
            times, by the layer's path.
        left_by_layer: The rest of `running_effect` after one layer gets the population's statistics, by the layer's
            path, worst layers first.
        reshuffled: Effect of normalizing the samples in new random batches.
        padding: Effect of padding on the statistics.
        example: Code for random arguments of the model, such as those that it was traced with.
        dataset: Code for the samples of the data. In the code, the data are named `training_data`.
    """

    model: str
    layers: tuple[Layer, ...]
    training: bool = True
    trains: bool = True
    device: str = ""
    dtype: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    averaged: str = ""
    optimizer_code: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    process_states: ProcessStates | None = None
    samples: int = 0
    batch_sizes: tuple[int, ...] = ()
    loss: bool = False
    loss_source: str = ""
    step: TrainingStep | None = None
    dropout: Mapping[str, float] = field(default_factory=dict)
    evaluated_in_training: tuple[str, ...] = ()
    left_in_training: tuple[str, ...] = ()
    gap: Effect | None = None
    training_mode_effect: Effect | None = None
    running_effect: Effect | None = None
    batch_effect: Effect | None = None
    distances: tuple[Distance, ...] = ()
    misfit: Misfit | None = None
    noise: Mapping[str, float] = field(default_factory=dict)
    dropout_scale: Mapping[str, float] = field(default_factory=dict)
    independence: Independence | None = None
    domains: Domains | None = None
    pooled_calls: Mapping[str, Effect] = field(default_factory=dict)
    left_by_layer: Mapping[str, Effect] = field(default_factory=dict)
    reshuffled: Effect | None = None
    padding: PaddingEffect | None = None
    example: str = EXAMPLE
    dataset: str = DATASET

    @property
    def measured(self) -> list[Layer]:
        """The layers whose running statistics can be measured."""
        return [layer for layer in self.layers if layer.running is not None]

    @property
    def batch_size(self) -> float:
        """The median size of a batch."""
        return float(median(self.batch_sizes))

    @property
    def dependent(self) -> bool:
        """Whether the batches are not independent samples."""
        return self.independence is not None and self.independence.rejected

    @property
    def effect_of_dependence(self) -> Effect | None:
        """The effect of the batches' statistics, or the gap to evaluation if that is worse.

        A network that does better with the statistics of its own batch is as faulty as one that does worse, because
        evaluation does not have these statistics.
        """
        effect, gap = self.batch_effect, self.gap
        if effect is not None and gap is not None and gap.loss is not None and gap.severity > effect.severity:
            return gap
        return effect

    @property
    def advice_on_mode(self) -> list[str]:
        """A line of evidence if the running statistics do better than the batches'; otherwise none."""
        effect = self.training_mode_effect
        if effect is None or effect.severity == Severity.NOTE or not self.training:
            return []
        return [f"in training mode against model.eval(): {effect}; if these batches are from an evaluation, call it"]

    @property
    def gap_matters(self) -> bool:
        """Whether evaluation is worse than training; without a loss, whether running statistics make the two differ."""
        gap, running, batches = self.gap, self.running_effect, self.batch_effect
        if gap is None or running is None or batches is None or gap.output <= OUTPUT_MATTERS:
            return False
        if gap.loss is None:
            return running.output >= batches.output
        return gap.loss > 0 and (gap.loss_interval is None or gap.loss_interval[0] > 0)

    def lacks(self, need: str) -> str | None:
        """Return why a need such as "data" or "step or trace" is not met; None if it is."""
        reasons = [self.missing.get(one) for one in need.split(" or ")]
        return None if None in reasons else reasons[0]

    def lacking(self, need: str, reason: str) -> Measurements:
        """Return these measurements with the reason why a need of rules is not met."""
        return replace(self, missing={**self.missing, need: reason})
