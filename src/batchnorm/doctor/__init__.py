"""What is wrong with the batch normalization in a model."""

from batchnorm.doctor.facts import LayerFacts
from batchnorm.doctor.finding import Finding, NotChecked, Severity
from batchnorm.doctor.report import Diagnosis
from batchnorm.doctor.verb import diagnose

__all__ = ["Diagnosis", "Finding", "LayerFacts", "NotChecked", "Severity", "diagnose"]
