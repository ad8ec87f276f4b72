"""Find what is wrong with the batch normalization of a model."""

from typing import TYPE_CHECKING

from batchnorm._frameworks import parts_on_demand

if TYPE_CHECKING:
    from batchnorm.doctor.finding import Finding, NotChecked, Severity
    from batchnorm.doctor.measure.facts import LayerFacts
    from batchnorm.doctor.pytorch.diagnosing import diagnose
    from batchnorm.doctor.report.diagnosis import Diagnosis
    from batchnorm.doctor.watching import BatchNormWarning, Record, Watch, watch

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

# The measurements, the rules and the reports need no framework, and the doctor for Keras shares them.
__getattr__ = parts_on_demand(
    __name__,
    BatchNormWarning="watching",
    Diagnosis="report.diagnosis",
    Finding="finding",
    LayerFacts="measure.facts",
    NotChecked="finding",
    Record="watching",
    Severity="finding",
    Watch="watching",
    diagnose="pytorch.diagnosing",
    watch="watching",
)
