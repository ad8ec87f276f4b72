from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed


class OwnForward(Rule):
    code = "BN212"
    title = "a subclass of batch normalization has a forward of its own"
    why = """
        Tools that find layers by isinstance treat it as plain batch normalization. They lose the rest of its forward,
        such as an activation. Examples are torch's fuse_conv_bn_eval and convert_sync_batchnorm.
    """
    evidence = """
        Layers whose class derives from torch's batch normalization, has a `forward` of its own, and belongs neither to
        torch nor to this library.
    """
    severity = "A note: the network itself is correct."
    repair = "folded, report = batchnorm.fold(model, example_inputs)  # follows calls, not classes"
    source = "PyTorch's sources of `torch.nn.utils.fusion` and `SyncBatchNorm.convert_sync_batchnorm`."

    def check(self, m: Measurements) -> Findings:
        found = {layer.path: layer.kind for layer in m.layers if layer.own_forward}
        if found:
            kinds = ", ".join(sorted(set(found.values())))
            yield self.finding(
                Severity.NOTE,
                found,
                f"{kinds} at {counted(len(found), 'place')}: {listed(found)}",
                repair=f"folded, report = batchnorm.fold(model, {m.example})  # follows calls, not classes",
            )
