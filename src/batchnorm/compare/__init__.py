"""Trains one network with several normalizations on the same data, and shows what each did.

Needs the extra `compare`: `pip install 'batchnorm[compare]'`. Importing this needs none of it.
"""

from batchnorm.compare.choices import Choice, Grid
from batchnorm.compare.data import Data, from_arrays, load
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.experiment import default_directory, run
from batchnorm.compare.norms import Norm, register
from batchnorm.compare.records import Evaluation, Histogram, Layer, Run, Step
from batchnorm.compare.results import Result, rebuild
from batchnorm.compare.settings import Settings
from batchnorm.compare.summary import Difference, Outcome, Spread

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
    "default_directory",
    "from_arrays",
    "load",
    "rebuild",
    "register",
    "run",
]
