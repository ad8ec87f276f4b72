"""BN212: subclasses that do more than batch normalization."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class OwnForward(Rule):
    """This library's layers are known to its tools and left out."""

    code = "BN212"
    title = "a subclass of batch normalization has a forward of its own"
    why = (
        "Tools that replace or fold layers by isinstance take it for plain batch normalization and lose what its "
        "forward does besides, such as an activation: torch's fuse_conv_bn_eval and convert_sync_batchnorm do."
    )
    repair = "folded, report = batchnorm.fold(model, example_inputs)  # follows calls, not classes"

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Of subclasses of torch's layers from elsewhere."""
        found = [layer for layer in probe.layers if _own(layer.module)]
        if found:
            kinds = ", ".join(sorted({type(layer.module).__name__ for layer in found}))
            yield self.finding(
                Severity.NOTE,
                [layer.path for layer in found],
                f"{kinds} at {counted(len(found), 'place')}: {listed(layer.path for layer in found)}",
            )


def _own(module: nn.Module) -> bool:
    kind = type(module)
    if not isinstance(module, _BatchNorm) or kind.__module__.partition(".")[0] in ("torch", "batchnorm"):
        return False
    return kind.forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
