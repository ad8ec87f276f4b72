from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule
from batchnorm.doctor.wording import loader_as_code


class NonIidBatches(Rule):
    code = "BN105"
    title = "batches are not independent samples of the data"
    why = """
        Batches that are sorted by class, drawn for metric learning, or cut from one video have statistics of their own.
        The network learns to use these. The running statistics average over batches, so they miss the spread between
        batches.
    """
    evidence = """
        An analysis of variance of the samples' means, with batches as groups. It measures how much more the means of
        batches vary than those of random batches. It is computed in evaluation, because no sample depends on its
        neighbors there. The largest ratio over all channels of all layers is compared with that of 199 random orders
        of the samples. This assumes no distribution, and thousands of channels cause no false alarm.

        Batches from a few domains in turn have a rule of their own, [BN115](bn115.md).

        A validation loader that is sorted by class also causes this finding. Pass the data as in training.
    """
    severity = """
        Decided by the cost of the batches' statistics against the population's, or by the gap to evaluation if the
        network has learned to use them.
    """
    repair = """
        loader = torch.utils.data.DataLoader(training_data.dataset, batch_size=64, shuffle=True)
        # if batches cannot be shuffled: exact statistics for evaluation, or no batch statistics (batchnorm.convert)
        model, report = batchnorm.recalibrate(model, training_data)
    """
    repair_keras = """
        # model.fit(x, y, shuffle=True), or dataset.shuffle(10_000).batch(64)
        # if batches cannot be shuffled: exact statistics for evaluation
        model, report = batchnorm.keras.recalibrate(model, training_data)
    """
    source = """
        Ioffe 2017, section 1; Westfall & Young 1993, *Resampling-Based Multiple Testing*; Wu & Johnson 2021, section 6.
    """
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        test, effect = m.independence, m.effect_of_dependence
        paths = [layer.path for layer in m.measured if layer.by_batch]
        if test is None or not test.rejected or effect is None or not paths or m.domains is not None:
            return
        inflation = float(test.inflation.mean())
        yield self.finding(
            effect.severity,
            paths,
            f"the means of batches vary {inflation:.3g} times as much as those of random batches "
            f"(p = {test.p:.2g}, {len(m.batch_sizes)} batches of {m.batch_size:g})",
            effect=effect,
            evidence=[
                f"of {test.permutations} random orders of the samples {round(test.p * (test.permutations + 1)) - 1} "
                "vary as much in their largest channel",
                f"batches' statistics against the population's: {m.batch_effect}",
                *m.advice_on_mode,
            ],
            repair=self.repair_from(loader_as_code(m.dataset)),
            inflation=inflation,
            p=test.p,
        )
