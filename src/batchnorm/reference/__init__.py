"""Batch normalization in NumPy and float64, step by step: the executable specification.

`forward_training` normalizes a batch and returns every intermediate value. `backward` takes the gradient of y, and
returns those of x, γ and β.

Examples:
    >>> import numpy as np
    >>> x = np.array([[1.0], [2.0], [3.0], [6.0]])  # N = 4 samples, C = 1 channel
    >>> forward = forward_training(x, eps=0.5)
    >>> forward.mean, forward.var, forward.invstd
    (array([3.]), array([3.5]), array([0.5]))
    >>> forward.y.ravel()
    array([-1. , -0.5,  0. ,  1.5])
    >>> backward([[1.0], [0.0], [0.0], [0.0]], forward).dx.ravel()
    array([ 0.25  , -0.1875, -0.125 ,  0.0625])

    With an activation, y is f(γ·x̂ + β), and `backward` includes f′:

    >>> forward = forward_training(x, eps=0.5, activation="sigmoid")
    >>> forward.y.ravel().round(3)
    array([0.269, 0.378, 0.5  , 0.818])
    >>> backward([[1.0], [0.0], [0.0], [0.0]], forward).dx.ravel().round(3)
    array([ 0.049, -0.037, -0.025,  0.012])

`backward_by_parts` differentiates step by step, `forward_inference` normalizes by running statistics, and
`update_running` updates them. Read the source next to the paper: Ioffe & Szegedy, "Batch Normalization: Accelerating
Deep Network Training by Reducing Internal Covariate Shift", 2015 (arXiv:1502.03167). "Section" without a paper means a
section of the mathematics page, which also lists errors in published texts. The library's layers and operators are
tested against this package. The code is written for readability, not for speed.

`x` is `[N, C, *S]`: samples first, channels second, unless `axis` gives another channel axis. Values per channel are
`[C]`, or `[K, C]` if `index [N]` selects a row for each sample: statistics by group (ghost batches, domains), or γ and
β by class (conditional normalization). Inputs are converted to float64. Long double stays long double.
"""

from batchnorm.reference.activations import ACTIVATIONS
from batchnorm.reference.layout import Layout
from batchnorm.reference.passes import (
    backward,
    backward_by_parts,
    double_backward,
    forward_inference,
    forward_training,
    normalize,
)
from batchnorm.reference.renorm import RenormForward, RenormGradients, backward_renorm, forward_renorm
from batchnorm.reference.results import DoubleGradients, Forward, Gradients, GradientsByParts
from batchnorm.reference.statistics import (
    CONVENTIONS,
    Moments,
    Running,
    ghost_index,
    merge,
    moments,
    pool,
    update_running,
)

__all__ = [  # noqa: RUF022 - in the order in which one reads them
    "forward_training",
    "backward",
    "backward_by_parts",
    "forward_inference",
    "normalize",
    "double_backward",
    "moments",
    "update_running",
    "merge",
    "ghost_index",
    "pool",
    "forward_renorm",
    "backward_renorm",
    "Forward",
    "Gradients",
    "GradientsByParts",
    "DoubleGradients",
    "Moments",
    "Running",
    "RenormForward",
    "RenormGradients",
    "Layout",
    "ACTIVATIONS",
    "CONVENTIONS",
]
