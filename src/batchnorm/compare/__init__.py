"""Train one network with several normalizations on the same data, and report the results.

A comparison needs the extra `compare` (`pip install 'batchnorm[compare]'`). The import does not.
"""

from batchnorm._frameworks import required_by

with required_by("batchnorm.compare"):
    from batchnorm.compare.errors import ComparisonError
    from batchnorm.compare.experiment import default_directory, run
    from batchnorm.compare.inputs import data
    from batchnorm.compare.inputs.choices import Choice, Grid
    from batchnorm.compare.inputs.data import Data, from_arrays, load
    from batchnorm.compare.inputs.norms import Norm, register
    from batchnorm.compare.inputs.settings import Settings
    from batchnorm.compare.records import Evaluation, Histogram, Layer, Run, Step
    from batchnorm.compare.report.results import Result, rebuild
    from batchnorm.compare.report.summary import Difference, Outcome, Spread

__all__ = [
    "Choice",
    "ComparisonError",
    "Data",
    "Difference",
    "Evaluation",
    "Grid",
    "Histogram",
    "Layer",
    "Norm",
    "Outcome",
    "Result",
    "Run",
    "Settings",
    "Spread",
    "Step",
    "data",
    "default_directory",
    "from_arrays",
    "load",
    "rebuild",
    "register",
    "run",
]
