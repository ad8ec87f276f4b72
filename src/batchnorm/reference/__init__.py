"""Batch normalization in NumPy and float64, step by step: the executable specification.

Read it next to the paper: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015 (arXiv:1502.03167). "Section" without a paper means a section of the mathematics page,
which also lists errors in published texts. The library's layers and operators are tested against this package. The code
is written for readability, not for speed.

`x` is `[N, C, *S]`: samples first, channels second, unless `axis` gives another channel axis. Values per channel are
`[C]`, or `[K, C]` if `index [N]` selects a row for each sample: statistics by group (ghost batches, domains), or γ and
β by class (conditional normalization). Inputs are converted to float64. Long double stays long double.

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
"""

from batchnorm.reference.passes import (
    ACTIVATIONS,
    DoubleGradients,
    Forward,
    Gradients,
    GradientsByParts,
    backward,
    backward_by_parts,
    double_backward,
    forward_inference,
    forward_training,
    normalize,
)
from batchnorm.reference.renorm import RenormForward, RenormGradients, backward_renorm, forward_renorm
from batchnorm.reference.statistics import (
    CONVENTIONS,
    Layout,
    Moments,
    Running,
    ghost_index,
    merge,
    moments,
    pool,
    update_running,
)

__all__ = [
    "ACTIVATIONS",
    "CONVENTIONS",
    "DoubleGradients",
    "Forward",
    "Gradients",
    "GradientsByParts",
    "Layout",
    "Moments",
    "RenormForward",
    "RenormGradients",
    "Running",
    "backward",
    "backward_by_parts",
    "backward_renorm",
    "double_backward",
    "forward_inference",
    "forward_renorm",
    "forward_training",
    "ghost_index",
    "merge",
    "moments",
    "normalize",
    "pool",
    "update_running",
]
