from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule
from batchnorm.doctor.wording import counted, named


class DomainsInTurn(Rule):
    code = "BN115"
    title = "batches come from several domains in turn"
    why = """
        Training normalizes each batch by its own domain: source or target data, clean or adversarial images, real or
        generated ones. The running statistics mix the domains, so evaluation normalizes each of them by a mean and a
        variance that none of them has.
    """
    evidence = """
        The batches are not independent samples of the data ([BN105](bn105.md)), but fall into two to four groups, and
        those of one group are independent samples of that group. The groups take turns: each occurs at least twice with
        others in between. The distance of the groups is the root mean square over the channels of the distance of their
        means, in the standard deviation of the samples' means.
    """
    severity = """
        Decided by the gap to evaluation, or by the cost of the batches' statistics against the population's if that is
        worse.
    """
    repair = """
        domains = [0, 1] * 6  # of the batches in training_data
        model, report = batchnorm.convert(model, batchnorm.DomainBatchNorm, num_domains=len(set(domains)))
        for domain in set(domains):
            batches = [batch for batch, own in zip(training_data, domains) if own == domain]
            with batchnorm.use_domain(domain):  # also around each call of the model, in training and in evaluation
                model, report = batchnorm.recalibrate(model, batches)
    """
    notes = """
        In the finding, the fix contains the domains that were found. If evaluation does not know the domain of a
        sample, mix the domains in each batch instead, and train again.
    """
    source = """
        Chang et al. 2019, *Domain-Specific Batch Normalization for Unsupervised Domain Adaptation*; Xie et al. 2020,
        *Adversarial Examples Improve Image Recognition* (AdvProp).
    """
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        domains, effect = m.domains, m.effect_of_dependence
        if domains is None or effect is None:
            return
        paths = sorted(domains.distances, key=lambda path: -domains.distances[path])
        number = domains.number
        yield self.finding(
            effect.severity,
            paths,
            f"{counted(len(domains.of_batches), 'batch')} come from {number} domains in turn, whose means are "
            f"{domains.distances[paths[0]]:.2g}σ apart at {named(paths[0])}",
            effect=effect,
            evidence=[f"batches' statistics against the population's: {m.batch_effect}"],
            repair=self.repair_from(f"domains = {_as_code(domains.of_batches)}  # of the batches in training_data"),
            domains=domains.of_batches,
            distances=domains.distances,
        )


def _as_code(domains: tuple[int, ...]) -> str:
    """Return the list as code, with its period if it has one."""
    for period in range(2, len(domains) // 2 + 1):
        times, rest = divmod(len(domains), period)
        if rest == 0 and domains == domains[:period] * times:
            return f"{list(domains[:period])} * {times}"
    return str(list(domains))
