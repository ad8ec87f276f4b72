"""What is wrong with the batch normalization in a model."""

from batchnorm.doctor.facts import LayerFacts
from batchnorm.doctor.finding import Finding, NotChecked, Severity
from batchnorm.doctor.report import Diagnosis
from batchnorm.doctor.telemetry import BatchNormWarning, Record, Watch, watch
from batchnorm.doctor.verb import diagnose

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
