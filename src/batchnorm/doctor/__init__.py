"""Find what is wrong with the batch normalization of a model."""

from batchnorm._frameworks import required_by

with required_by("batchnorm.doctor"):
    from batchnorm.doctor.diagnose import diagnose
    from batchnorm.doctor.finding import Finding, NotChecked, Severity
    from batchnorm.doctor.measure.facts import LayerFacts
    from batchnorm.doctor.report.diagnosis import Diagnosis
    from batchnorm.doctor.watch import BatchNormWarning, Record, Watch, watch

__all__ = [
    "BatchNormWarning",
    "Diagnosis",
    "Finding",
    "LayerFacts",
    "NotChecked",
    "Record",
    "Severity",
    "Watch",
    "diagnose",
    "watch",
]
