"""Load an exported program (.pt2) without running code from the file.

`torch.export.load` unpickles members of the archive, evaluates expressions for sizes as Python, looks operators up as
attributes of torch, and loads compiled libraries. A file is therefore checked first. If it needs more than tensors and
operators on them, it is loaded only if the user trusts it.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._sympy import functions as sympy_functions

# Libraries whose operators neither read nor write files.
_LIBRARIES = {"aten", "prims", "batchnorm", "quantized_decomposed", "torchvision"}
_FILES = {"torch.ops.aten.from_file.default"}
_HIGHER_ORDER = {"cond", "wrap_with_set_grad_enabled", "wrap_with_autocast"}
_OPERATORS = {
    f"_operator.{name}"
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs", "getitem",
        "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "lshift", "rshift",
    )
}  # fmt: skip
# The names of functions in expressions, as sympy prints them, and in guards.
_FUNCTIONS = {
    *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Abs", "floor", "ceiling"),
    *("Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And", "Or", "Not"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "max", "min", "abs", "int", "float", "bool"),
    *sympy_functions.__all__,
}
_METHODS = {"size", "stride", "storage_offset"}
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_EXPRESSION = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.Subscript,
    ast.Attribute, ast.Name, ast.Constant, ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_NAME = re.compile(r"[\w.+-]*")
_ARITHMETIC = re.compile(r"math\.[a-z][a-z0-9]*|torch\._?sym_[a-z_]+")


class UntrustedError(ValueError):
    """A file holds more than tensors and operators on them; the message names the rest."""


def load(path: Path, *, trust: bool) -> torch.export.ExportedProgram:
    """Return the program in the file.

    Args:
        path: A file of `torch.export.save`.
        trust: Whether the file may run code.

    Raises:
        UntrustedError: It may run code, and `trust` is False.
        Exception: It is damaged, or torch cannot load it.
    """
    with _quiet() as failures:
        if not trust:
            check(path)
        try:
            return torch.export.load(path)
        except Exception as error:
            raise (failures[0] if failures else error) from error


def check(path: Path) -> None:
    """Check that loading and running the program runs no code from the file.

    Raises:
        UntrustedError: It may run code.
        Exception: It is not an archive of a program.
    """
    reader = torch._C.PyTorchFileReader(str(path))  # the one that torch.export.load uses
    records = reader.get_all_records()
    pickled = {name for name in records if name.startswith("data/sample_inputs/") or name.endswith(".pt")}
    for name in records:
        if name.startswith("data/aotinductor/"):
            raise UntrustedError("a compiled library")
        if name.startswith("models/") or name.endswith("_config.json"):
            content = json.loads(reader.get_record(name))
            _check_values(content)
            if name.endswith("_config.json"):
                pickled |= _pickled_payloads(name, content)
    for name in pickled:
        _check_pickled(name, reader.get_record(name))


def _pickled_payloads(config: str, content: Any) -> set[str]:
    """Return the records of a configuration that torch unpickles."""
    found = set()
    for entry in content["config"].values():
        path = entry["path_name"]
        if path.startswith(("custom_obj_", "opaque_obj_")):
            raise UntrustedError(f"an object that is not a tensor ({path})")
        if entry["use_pickle"]:
            found.add(f"{config.rpartition('/')[0]}/{path}")
    return found


def _check_pickled(name: str, content: bytes) -> None:
    try:
        if content:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UntrustedError(f"an object that torch.load refuses with weights_only=True ({name})") from error


def _check_values(value: Any, key: str = "") -> None:
    """Check every string that torch evaluates, looks up or writes into generated code."""
    if isinstance(value, dict):
        # Comments and names for people: torch only stores them.
        if key == "metadata" and all(isinstance(part, str) for part in value.values()):
            return
        for name, part in value.items():
            _check_name(name)
            _check_values(part, name)
    elif isinstance(value, list):
        for part in value:
            _check_values(part, key)
    elif isinstance(value, str):
        _CHECKS.get(key, _check_name)(value)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UntrustedError(f"the name {name[:60]!r}")


def _check_operator(target: str) -> None:
    parts = target.split(".")
    allowed = target in _OPERATORS or _ARITHMETIC.fullmatch(target) is not None
    if target.startswith("torch.ops.higher_order."):
        allowed = len(parts) == 4 and parts[3] in _HIGHER_ORDER
    elif target.startswith("torch.ops.") and len(parts) == 5 and parts[2] in _LIBRARIES and target not in _FILES:
        found: Any = torch.ops
        for part in parts[2:]:
            found = getattr(found, part, None)
        allowed = isinstance(found, torch._ops.OpOverload)
    if not allowed:
        raise UntrustedError(f"the operator {target[:60]!r}")


def _check_expression(text: str) -> None:
    """Check that an expression only computes with numbers, sizes and strides."""
    refused = UntrustedError(f"the expression {text[:60]!r}")
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except SyntaxError as error:
        raise refused from error
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        allowed = isinstance(node, _EXPRESSION)
        if isinstance(node, ast.Call):
            allowed = isinstance(node.func, (ast.Name, ast.Attribute))
        elif isinstance(node, ast.Attribute):
            known = node.attr in _METHODS or _ARITHMETIC.fullmatch(ast.unparse(node)) is not None
            allowed = id(node) in called and known
        elif isinstance(node, ast.Name) and id(node) in called:
            allowed = node.id in _FUNCTIONS
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            allowed = _NAME.fullmatch(node.value) is not None
        if not allowed:
            raise refused


def _check_structure(text: str) -> None:
    """Check that arguments or results are nested tuples, lists and dicts, in which torch imports nothing."""
    _, structure = json.loads(text)
    waiting = [structure]
    while waiting:
        node = waiting.pop()
        if node["type"] is not None and node["type"] not in _CONTAINERS:
            raise UntrustedError(f"arguments or results of the type {str(node['type'])[:60]}")
        if "{" in (node["context"] or ""):
            raise UntrustedError("keys of a dictionary that are not strings")
        waiting += node["children_spec"]


_CHECKS = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "guards_code": _check_expression,
    "in_spec": _check_structure,
    "out_spec": _check_structure,
    "as_string": lambda text: None,  # written into generated code by repr
    "as_strings": lambda text: None,
}


@contextmanager
def _quiet() -> Iterator[list[BaseException]]:
    """Keep torch from printing warnings and tracebacks; yield a list of the exceptions in them."""
    failures: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            failures.append(record.exc_info[1])
        return False

    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.export.pt2_archive._package")]
    loggers.append(logging.getLogger("torch._export.serde.serialize"))
    for logger in loggers:
        logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield failures
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
