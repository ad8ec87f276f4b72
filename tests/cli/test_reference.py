"""The table of arguments in the reference of the command line names every argument of the functions."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import click
import pytest

import batchnorm
import batchnorm.compare
from batchnorm.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "command-line-reference.md"
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "accelerate": (batchnorm.accelerate,),
    "fold": (batchnorm.fold, batchnorm.fold_onnx),
    "recalibrate": (batchnorm.recalibrate,),
    "doctor": (batchnorm.diagnose,),
    "standardize": (batchnorm.Standardizer,),
    "compare": (batchnorm.compare.run,),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_an_option_or_is_named_as_without(name: str) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    *_, pairs, without, _ = row.split(" |")
    options = {option for parameter in app.commands[name].params for option in parameter.opts}
    assert isinstance(app.commands[name], click.Command)
    assert set(re.findall("`(--[a-z-]+)`", pairs)) <= options
    arguments = {argument for function in FUNCTIONS[name] for argument in inspect.signature(function).parameters}
    if name == "compare":
        assert {f"--{argument.replace('_', '-')}" for argument in arguments - {"progress"}} <= options
    else:
        assert arguments - {"model"} == set(re.findall("`([a-z_]+)`", pairs + without)) - {"state_dict"}
