"""Remove batch normalization from a network, for inference."""

from batchnorm.models.report import FoldError, FoldReport
from batchnorm.surgery.fold.pytorch.counting import Counts, count_batch_norms
from batchnorm.surgery.fold.pytorch.folding import fold

__all__ = ["Counts", "FoldError", "FoldReport", "count_batch_norms", "fold"]
