"""Population statistics for a trained model."""

from batchnorm.recalibrate.report import LayerStatistics, Recalibration
from batchnorm.recalibrate.verb import recalibrate

__all__ = ["LayerStatistics", "Recalibration", "recalibrate"]
