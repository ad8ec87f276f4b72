"""Remove batch normalization from a network, for inference."""

from batchnorm.surgery.fold.pytorch.counting import Counts, count_batch_norms
from batchnorm.surgery.fold.pytorch.folding import fold
from batchnorm.surgery.fold.report import FoldError, FoldReport

__all__ = ["Counts", "FoldError", "FoldReport", "count_batch_norms", "fold"]
