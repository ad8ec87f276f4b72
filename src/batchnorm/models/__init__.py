"""Tools for a model and its data, which `recalibrate`, `surgery` and `doctor` share.

data: The data of a model: batches, arguments and results.
execution: Run a model over data, and observe its layers.
graphs: Graphs of a model, and of one module's `forward`.

Functions that change a model also share:

selection: The layers that the user chooses, as with `only=`.
report: The layers that were changed or left, with reasons; imports no framework.
description: Describe a layer of PyTorch.
gate: How much error folding may add; imports no framework.
"""

from typing import TYPE_CHECKING

from batchnorm._frameworks import parts_on_demand

if TYPE_CHECKING:
    from batchnorm.models import report as report

__getattr__ = parts_on_demand(__name__, "report")
