"""Population statistics for a trained model."""

from batchnorm.recalibrate.recalibrate import recalibrate
from batchnorm.recalibrate.report import LayerStatistics, Recalibration

__all__ = ["LayerStatistics", "Recalibration", "recalibrate"]
