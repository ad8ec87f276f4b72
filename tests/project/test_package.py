"""The package as a whole: what it exports, and what importing it costs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

import batchnorm
from batchnorm._backends import Backends
from tests.nn.test_family_contract import FAMILY
from tests.project.missing import HIDE

ROOT = Path(__file__).parents[2]
# test_learn.py runs the pages of "Learn", as notebooks.

# Every layer of the family is a class for each rank and, except for BatchNormAct, one that takes every rank.
LAYERS = {
    stem if stem == name else stem + rank
    for name in FAMILY
    for stem in [name.removesuffix("2d")]
    for rank in ("", "1d", "2d", "3d")
} - {"BatchNormAct"}
PUBLIC_NAMES = LAYERS | {
    "FrozenBatchNormAct1d",
    "FrozenBatchNormAct2d",
    "FrozenBatchNormAct3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "PaperSchedule",
    "Standardizer",
    "__version__",
    "accelerate",
    "backends",
    "convert",
    "diagnose",
    "drop_redundant_bias",
    "fold",
    "fold_onnx",
    "freeze",
    "functional",
    "insert_batchnorm",
    "join",
    "keep_domain",
    "keep_memory",
    "microbatch_momentum",
    "momentum_per_microbatch",
    "nn",
    "parameter_groups",
    "prune_channels",
    "recalibrate",
    "unfreeze",
    "update_running_stats",
    "use_domain",
    "watch",
}


def test_public_names_are_pinned():
    assert set(batchnorm.__all__) == PUBLIC_NAMES
    assert len(batchnorm.__all__) == len(PUBLIC_NAMES)
    rooms = {name for name in set(dir(batchnorm)) - PUBLIC_NAMES if isinstance(getattr(batchnorm, name), ModuleType)}
    assert set(dir(batchnorm)) == PUBLIC_NAMES | rooms
    assert not [name for name in rooms if name.startswith("_")]


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES - {"__version__"}))
def test_public_names_are_documented(name):
    assert getattr(batchnorm, name).__doc__


def test_version_is_the_distributions():
    assert batchnorm.__version__ == importlib.metadata.version("batchnorm")


def test_a_checkout_that_is_not_installed_can_be_imported(tmp_path):
    # The installed packages without this one; -S also ignores the editable installation's path file.
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if "batchnorm" not in entry.name:
                (tmp_path / entry.name).symlink_to(entry)
    path = os.pathsep.join([str(ROOT / "src"), str(tmp_path)])
    code = """
import importlib.metadata, batchnorm
assert not [d for d in importlib.metadata.distributions() if d.name == "batchnorm"]
print(batchnorm.__version__, *batchnorm.__path__)
"""
    command = [sys.executable, "-S", "-c", code]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [batchnorm.__version__, str(ROOT / "src" / "batchnorm")]


LOADED_BY = """
import json, sys
{first}
before = set(sys.modules)
{then}
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def loaded_by(then: str, first: str = "") -> tuple[list[str], list[str]]:
    """The modules that a fresh process has loaded after `first`, and those that `then` adds."""
    program = LOADED_BY.format(first=first, then=then)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, added = json.loads(run.stdout)
    # The editable install's own import hook is no part of the package.
    return before, [module for module in added if not module.startswith("_editable_")]


def test_import_loads_nothing_else():
    # The hook of an editable installation loads the other two.
    added = loaded_by("import batchnorm", "import importlib.machinery, warnings")[1]
    assert added == ["batchnorm", "batchnorm._version"]


@pytest.fixture(scope="module")
def first_use():
    """The modules that layers and functions for models load in a process that has already imported torch."""
    return loaded_by("from batchnorm import BatchNorm2d, Moments, backends, convert, recalibrate", "import torch")


def test_first_use_loads_nothing_but_torch_and_numpy(first_use):
    packages = {module.partition(".")[0] for module in first_use[1]}
    assert packages - sys.stdlib_module_names <= {"batchnorm", "torch", "numpy"}


def test_first_use_loads_neither_compilers_nor_the_command_line(first_use):
    late = [
        "batchnorm.cli",
        "batchnorm.compare",
        "torch._dynamo",
        "torch._inductor",
        "torch.export",
        "torch.onnx",
        "torch.testing",
    ]
    loaded = [m for m in first_use[1] if any(f"{m}.".startswith(f"{name}.") for name in late)]
    assert loaded == []


def test_first_use_is_small_beside_torch(first_use):
    # Modules, not seconds: a count is the same on every machine.
    by_torch, by_batchnorm = first_use
    assert len(by_batchnorm) < len(by_torch) / 10


def test_first_use_does_not_initialise_cuda():
    program = "import torch, batchnorm; batchnorm.backends(); raise SystemExit(torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_star_import_binds_every_public_name():
    namespace: dict[str, object] = {}
    exec("from batchnorm import *", namespace)
    assert set(namespace) >= PUBLIC_NAMES


def test_a_function_is_not_hidden_by_a_module_that_is_imported_later():
    importlib.import_module("batchnorm.recalibration.recalibrate")
    importlib.import_module("batchnorm.doctor.watching.watcher")
    assert callable(batchnorm.recalibrate) and callable(batchnorm.doctor.watch)


def test_an_import_of_the_earlier_module_gives_the_function():
    assert importlib.import_module("batchnorm.recalibrate") is batchnorm.recalibrate


def test_every_documented_module_is_an_attribute():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: batchnorm\.([a-z]+)", pages, re.MULTILINE))
    assert documented and documented <= set(batchnorm._MODULES)


ON_DEMAND = """
from functools import reduce
import batchnorm
for name in {names}:
    assert reduce(getattr, name.split("."), batchnorm).__name__ == "batchnorm." + name, name
"""


def test_importing_the_package_makes_every_module_an_attribute():
    # Keras and Lightning take seconds to import, and are reached in the same way.
    names = {*batchnorm._MODULES, "models.report", "surgery.prune", "integrations.transformers"} - {"jax", "keras"}
    if all(map(importlib.util.find_spec, ("jax", "flax"))):
        names |= {"jax", "jax.linen", "jax.nnx"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", ON_DEMAND.format(names=sorted(names))], check=True)


def test_type_checkers_see_every_name():
    tree = ast.parse(Path(batchnorm.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen - {"*"} | set(batchnorm.nn.__all__) == {*batchnorm.__all__, *batchnorm._MODULES} - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(batchnorm, "BatchNorm4d")


WITHOUT = """
import doctest, importlib, inspect, json
import batchnorm
errors = {{}}
for name in {names}:
    try:
        exec(f"from batchnorm import {{name}}")
    except Exception as error:
        errors[name] = [type(error).__name__, getattr(error, "name", ""), str(error)]
listed = [name for name, _ in inspect.getmembers(batchnorm)]
doctest.DocTestFinder().find(batchnorm)
for module in {modules}:
    importlib.import_module(module)
print(json.dumps([errors, listed]))
"""
FREE_NAMES = {"__version__", "backends", "keep_memory"}  # the public names that need no framework
TITLES = {"jax": "JAX", "keras": "Keras"}  # the rooms of other frameworks than PyTorch
FRAMEWORKS = ["torch", "jax", "jaxlib", "flax", "keras", "tensorflow"]
# Modules that need no framework, with those that they share with the rooms of JAX and Keras.
FRAMEWORK_FREE = [
    "_backends",
    "_options",
    "compiled",
    "files",
    "importing",
    "memory",
    "models.gate",
    "models.execution.progress",
    "models.report",
    "models.selection",
    "page",
    "reference",
    "state",
    "text",
]


@pytest.fixture(scope="module")
def without_frameworks():
    """The errors of public names in a process without any framework, and the names that it lists."""
    program = HIDE.format(missing=FRAMEWORKS) + WITHOUT.format(
        names=sorted({*PUBLIC_NAMES, *TITLES}),
        modules=[f"batchnorm.{name}" for name in FRAMEWORK_FREE],
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_without_a_framework_a_name_says_what_to_install(without_frameworks):
    errors, _ = without_frameworks
    assert set(errors) == {*PUBLIC_NAMES, *TITLES} - FREE_NAMES
    for name, error in errors.items():
        framework = name if name in TITLES else "torch"
        assert error[:2] == ["MissingFrameworkError", framework]
        title = TITLES.get(framework, "PyTorch")
        assert error[2] == (
            f"batchnorm.{name} needs {title}, which is not installed; run pip install 'batchnorm[{framework}]'."
        )


def test_without_torch_only_names_that_can_be_imported_are_listed(without_frameworks):
    _, listed = without_frameworks
    assert {*FREE_NAMES, "reference", "state"} <= set(listed)
    assert not set(listed) & (PUBLIC_NAMES - FREE_NAMES)


def test_without_a_framework_backends_prints_that_there_is_none():
    assert str(Backends({}, ())) == "none: neither PyTorch nor JAX is installed"


WITHOUT_TORCH = """
import numpy as np
import batchnorm
x = np.float32([[1.0], [3.0]])
y, mean, var = batchnorm.jax.batch_norm(x)
layer = batchnorm.keras.BatchNormalization()
layer(x, training=True)
state = batchnorm.state.from_keras(layer)
print(float(mean[0]), float(var[0]), round(float(state.mean[0]), 4))
"""


def test_without_torch_jax_and_keras_work():
    if not all(map(importlib.util.find_spec, ("jax", "keras"))):
        pytest.skip("JAX or Keras is not installed")
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HIDE.format(missing=["torch"]) + WITHOUT_TORCH]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout == "2.0 1.0 0.02\n", run.stderr


def test_without_torch_the_command_line_says_what_to_install():
    main = "from batchnorm.cli import main; main(['inspect', 'torch.nn:Identity'])"
    program = HIDE.format(missing=FRAMEWORKS) + main
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == (
        "batchnorm: this command needs PyTorch, which is not installed; run pip install 'batchnorm[torch]'.\n"
    )
