"""Test whether the batches of a training are independent samples, by the model's own inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.doctor.measure.domains import Domains, domains_of
from batchnorm.doctor.measure.independence import Independence, independence_of
from batchnorm.doctor.measure.layers import Array
from batchnorm.doctor.pytorch.layers import as_array

# Number of features of a sample: means of as many equal parts of its values.
_FEATURES = 64
# Numbers of batches after which they are tested, and the number that is kept.
_TESTED = (6, 8, 12, 16, 24, 32)
# Batches count as dependent only far beyond chance, because several tests are made in every training.
_PERMUTATIONS, _SIGNIFICANT, _INFLATED = 999, 0.001, 2.0


@torch.no_grad()
def features_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return features `[N, features]` of the first floating-point input `[N, ...]`; None if there is none."""
    for x in (*args, *kwargs.values()):
        if type(x) is Tensor and x.is_floating_point() and x.dim() > 1 and x.numel():
            flat = x.detach().flatten(1).float()
            return flat if flat.shape[1] <= _FEATURES else F.adaptive_avg_pool1d(flat[None], _FEATURES)[0]
    return None


class InputBatches:
    """The features of the inputs in the steps that were looked at.

    Inputs do not change while the weights learn, so batches of different steps can be compared.
    """

    def __init__(self) -> None:
        self._batches: deque[Array] = deque(maxlen=_TESTED[-1])
        self._seen = 0

    def add(self, features: Tensor | None) -> tuple[Independence, Domains | None] | None:
        """Add the features of a batch; return the test and the domains if the batches are dependent."""
        if features is None or (self._batches and features.shape[1] != self._batches[0].shape[1]):
            return None
        self._batches.append(as_array(features))
        self._seen += 1
        return self._tested() if self._seen in _TESTED else None

    def _tested(self) -> tuple[Independence, Domains | None] | None:
        values = np.nan_to_num(np.concatenate(self._batches), posinf=0.0, neginf=0.0)
        batch = np.repeat(np.arange(len(self._batches)), [len(features) for features in self._batches])
        inflation = independence_of(values, batch, permutations=0).inflation
        if not len(inflation) or float(inflation.mean()) < _INFLATED:
            return None
        test = independence_of(values, batch, permutations=_PERMUTATIONS)
        return (test, domains_of({"": values}, batch)) if test.p <= _SIGNIFICANT else None
