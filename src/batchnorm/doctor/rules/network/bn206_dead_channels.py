from __future__ import annotations

from batchnorm.doctor.measure.layers import DEAD_SHARE, dead_channels
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, layers_listed, named


class DeadChannels(Rule):
    code = "BN206"
    title = "many channels have γ = 0"
    why = """
        A channel with γ near 0 returns its β for any input. Too much weight decay or too large a learning rate causes
        many such channels; pruning creates them on purpose. They still cost time and memory.
    """
    evidence = """
        Layers in which at least a quarter of the channels have |γ| < 0.001. Layers whose γ is 0 throughout are left
        out: residual branches are often initialized that way.
    """
    severity = "A note: the network works without these channels."
    repair = """
        groups = batchnorm.parameter_groups(model, weight_decay=1e-4)  # keeps γ out of weight decay
        # or remove the channels: model, report = batchnorm.prune_channels(model, example_inputs)
    """
    repair_keras = """
        # keep γ out of weight decay: optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    """
    source = """
        Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*; Mehta et al. 2019, *On
        implicit filter level sparsity in convolutional neural networks*.
    """

    def check(self, m: Measurements) -> Findings:
        dead, share = {}, {}
        for layer in m.layers:
            weight = layer.vectors.weight
            if weight is None or bool((weight == 0).all()):
                continue
            small = dead_channels(weight)
            if (here := float(small.mean())) >= DEAD_SHARE:
                share[layer.path], dead[layer.path] = here, int(small.sum())
        found = sorted(share, key=lambda path: -share[path])
        if found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"{counted(sum(dead.values()), 'channel')} of {layers_listed(found)}",
                evidence=[f"{named(path)}: {share[path]:.0%} of its channels" for path in found[:5]],
                share=share,
            )
