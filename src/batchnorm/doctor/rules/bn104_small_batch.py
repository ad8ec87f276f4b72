"""BN104: batches so small that their statistics are noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.bn105_non_iid_batches import dependent
from batchnorm.doctor.rules.rule import Rule

# Deviation of a normalized value by the choice of its neighbours that is worth a word, and the one to aim at.
NOISY, AIM = 0.25, 0.1


class SmallBatch(Rule):
    """Noise from the spread of whole samples; its effect from the same batches normalized by the population."""

    code = "BN104"
    title = "the batch is too small for its statistics"
    why = (
        "In training a sample's output depends on which others are in its batch, by an amount that falls as 1/√N. "
        "With few samples that is noise which evaluation does not have; with one value per channel there is nothing "
        "left."
    )
    repair = (
        "# larger batches, or statistics over several processes or steps\n"
        "model, report = batchnorm.convert(model, batchnorm.SyncBatchNorm)  # or batchnorm.BatchRenorm"
    )
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Batches of one value, and noise whose effect is measured."""
        assert probe.data is not None
        single = [layer for layer in probe.measured if layer.one_value and layer.by_batch]
        if single:
            most, number = max(layer.one_value for layer in single), len(probe.data.sizes)
            yield self.finding(
                Severity.ERROR if most == number else Severity.WARNING,
                [layer.path for layer in single],
                f"one value per channel in {most} of {counted(number, 'batch')} at "
                f"{listed(layer.path for layer in single)}: "
                "training raises an error there, or gives β",
                repair="loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)",
                batches=most,
            )
            if most == number:
                return
        effect = probe.batch_effect
        if effect is None or dependent(probe):
            return
        size = probe.batch_size
        noise = {layer.path: value for layer, value in probe.noise.items()}
        worst = sorted(noise, key=lambda path: -noise[path])
        if not worst or (noise[worst[0]] < NOISY and effect.severity == Severity.NOTE):
            return
        needed = math.ceil(size * (noise[worst[0]] / AIM) ** 2)
        yield self.finding(
            effect.severity if effect.loss is not None else Severity.NOTE,  # noise that may do good, as far as is known
            worst,
            f"at {size:g} samples a normalized value at {worst[0] or '(model)'} moves by {noise[worst[0]]:.2g}σ with "
            f"the rest of its batch ({median(noise.values()):.2g}σ in the median layer); {AIM}σ takes about {needed}",
            evidence=[f"by the batches' statistics against the population's: {effect}"],
            confidence=effect.confidence,
            cost=effect.cost,
            batch_size=size,
            noise=noise,
            batch_size_needed=needed,
        )
