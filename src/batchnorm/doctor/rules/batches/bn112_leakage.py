from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import loader_as_code


class Leakage(Rule):
    code = "BN112"
    title = "the network has learned to use the other samples of its batch"
    why = """
        Batch statistics carry information that the samples of a batch share: their class, their pair, whether they are
        generated. A network that is trained on such batches learns to use it, as in contrastive learning and GANs. In
        evaluation, this information is missing.
    """
    evidence = """
        The samples are put into new random batches of the same sizes, each normalized by its own statistics. Any change
        of a sample's output comes from its neighbors. This takes one of the `budget=` passes. It is done only if
        evaluation is worse than training on the same batches, and stale running statistics do not explain that.
    """
    severity = """
        Decided by the added loss with the new neighbors, and by the change of the outputs. Without a loss, it is never
        an error, and is checked only if batches are not independent ([BN105](bn105.md)), because the noise of small
        batches changes outputs just as much.
    """
    repair = """
        loader = torch.utils.data.DataLoader(training_data.dataset, batch_size=64, shuffle=True)
        # if batches cannot be shuffled, use no statistics of the batch; then train again
        model, report = batchnorm.convert(model, torch.nn.GroupNorm, num_groups=8)
    """
    source = """
        Hénaff et al. 2020, *Data-Efficient Image Recognition with Contrastive Predictive Coding*; He et al. 2020,
        *Momentum Contrast for Unsupervised Visual Representation Learning*, section 3.3 (shuffling BN).
    """
    needs = ("data", "output", "pass")
    causes = ("BN115", "BN105")

    def check(self, m: Measurements) -> Findings:
        effect = m.reshuffled
        if effect is not None and effect.severity > Severity.NOTE:
            yield self.finding(
                effect.severity,
                [layer.path for layer in m.measured if layer.by_batch],
                f"the same samples in new random batches: {effect}",
                effect=effect,
                evidence=[f"evaluation against training: {m.gap}"],
                repair=self.repair_from(loader_as_code(m.dataset)),
            )
