"""The results of functions that change a model: one kind, whatever the function."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import batchnorm
from batchnorm.models.report import Report, Result

FUNCTIONS = (
    batchnorm.accelerate,
    batchnorm.convert,
    batchnorm.drop_redundant_bias,
    batchnorm.fold,
    batchnorm.fold_onnx,
    batchnorm.freeze,
    batchnorm.insert_batchnorm,
    batchnorm.prune_channels,
    batchnorm.recalibrate,
    batchnorm.unfreeze,
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_that_changes_a_model_returns_a_result(function: Callable[..., object]) -> None:
    annotation = function.__annotations__["return"]
    assert annotation.startswith("Result[") and function.__globals__["Result"] is Result


def test_a_result_can_be_indexed_unpacked_and_read_by_name() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    result = batchnorm.freeze(model)
    changed, report = result
    assert result[0] is changed is result.model and result[1] is report is result.report
    assert len(result) == 2 and isinstance(report, Report)
    assert repr(result).startswith("Result(model=Sequential(")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))])
def test_a_result_is_copied_as_a_result(copied: Callable[[Any], Any]) -> None:
    again = copied(batchnorm.freeze(nn.Sequential(nn.BatchNorm1d(2))))
    assert type(again) is Result and again.report.changed[0].now == "FrozenBatchNorm1d(2)"
