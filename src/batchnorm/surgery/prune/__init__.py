"""Remove channels whose γ is zero or small."""

from batchnorm.surgery.prune.prune import prune_channels
from batchnorm.surgery.prune.report import PruneError, PruneReport

__all__ = ["PruneError", "PruneReport", "prune_channels"]
