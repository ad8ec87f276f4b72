"""Population statistics for a trained model."""

from batchnorm._frameworks import required_by

with required_by("batchnorm.recalibration"):
    from batchnorm.models.report import LayerStatistics, Recalibration
    from batchnorm.recalibration.recalibrate import recalibrate

__all__ = ["LayerStatistics", "Recalibration", "recalibrate"]
