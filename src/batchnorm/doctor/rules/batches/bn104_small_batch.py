from __future__ import annotations

from statistics import median

from batchnorm.doctor.measure.layers import NOISE_AIM, NOISY, samples_needed
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed, loader_as_code, noise_at


class SmallBatch(Rule):
    code = "BN104"
    title = "the batch is too small for its statistics"
    why = """
        In training, the output for a sample depends on the other samples of its batch, by an amount that falls as 1/√N.
        With few samples, this is noise that evaluation does not have. With one value per channel, normalization removes
        the whole input.
    """
    evidence = """
        The standard deviation of a normalized value when the other samples of its batch vary: √((Var(u)/σ² +
        Var(v)/(4σ⁴))/N). Here u is the mean of a sample over its positions, v its mean square deviation, and N the
        number of samples in a batch. Whole samples are measured, so similar pixels do not count as independent. The
        finding says how many samples bring the noisiest layer down to 0.1σ.

        Batches with a single value per channel are counted, except at layers that normalize some of them by the running
        statistics (`on_single="running"`).
    """
    severity = """
        Decided by the cost of the batches' statistics against the population's, on the same batches. One value per
        channel is an error in every batch, and a warning in some batches, because torch refuses to train on them.
        Without a loss, noise is a note, because it also regularizes.
    """
    repair = """
        # larger batches, or statistics over several processes or steps
        model, report = batchnorm.convert(model, batchnorm.SyncBatchNorm)  # or batchnorm.BatchRenorm
    """
    repair_keras = """
        # larger batches: model.fit(x, y, batch_size=64); or statistics that depend less on the batch
        model, report = batchnorm.keras.convert(model, renorm=True)
    """
    source = """
        Wu & He 2018, *Group Normalization*, figure 1; Ioffe 2017, *Batch Renormalization*, section 3; the tutorial,
        “How much noise, by hand”.
    """
    needs = ("data",)
    causes = ("BN214",)

    def check(self, m: Measurements) -> Findings:
        number = len(m.batch_sizes)
        single = [
            layer
            for layer in m.measured
            if layer.single_value_batches
            and layer.by_batch
            and (layer.single_value_batches == number or layer.on_single == "error")
        ]
        if single:
            most = max(layer.single_value_batches for layer in single)
            yield self.finding(
                Severity.ERROR if most == number else Severity.WARNING,
                [layer.path for layer in single],
                f"one value per channel in {most} of {counted(number, 'batch')} at "
                f"{listed(layer.path for layer in single)}: training raises an error there, or cannot normalize by "
                "the batch",
                repair=f"{loader_as_code(m.dataset, ', drop_last=True')}\n"
                '# or: model, report = batchnorm.convert(model, batchnorm.nn, on_single="running")',
                batches=most,
            )
            if most == number:
                return
        effect = m.batch_effect
        if effect is None or m.dependent or not m.noise:
            return
        worst = sorted(m.noise, key=lambda path: -m.noise[path])
        noise = m.noise[worst[0]]
        if noise < NOISY and effect.severity == Severity.NOTE:
            return
        needed = samples_needed(m.batch_size, noise)
        yield self.finding(
            effect.severity if effect.loss is not None else Severity.NOTE,
            worst,
            f"{noise_at(worst[0], m.batch_size, noise)} ({median(m.noise.values()):.2g}σ in the median layer); "
            f"{NOISE_AIM}σ takes about {needed}",
            effect=effect,
            evidence=[f"batches' statistics against the population's: {effect}", *m.advice_on_mode],
            batch_size=m.batch_size,
            noise=m.noise,
            batch_size_needed=needed,
        )
