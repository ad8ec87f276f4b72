"""The package as a whole: what it exports, what importing it costs, and the examples in its pages."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

PUBLIC_NAMES = {
    "accelerate",
    "diagnose",
    "drop_redundant_bias",
    "insert_batchnorm",
    "parameter_groups",
    "prune_channels",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ConditionalBatchNorm",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "DecorrelatedBatchNorm",
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "DomainBatchNorm",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenBatchNormAct1d",
    "FrozenBatchNormAct2d",
    "FrozenBatchNormAct3d",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "PaperSchedule",
    "Standardizer",
    "SyncBatchNorm",
    "__version__",
    "backends",
    "convert",
    "fold",
    "fold_onnx",
    "freeze",
    "functional",
    "join",
    "keep_domain",
    "microbatch_momentum",
    "momentum_per_microbatch",
    "nn",
    "recalibrate",
    "unfreeze",
    "update_running_stats",
    "use_domain",
    "watch",
}


def test_public_names_are_pinned():
    assert set(batchnorm.__all__) == PUBLIC_NAMES
    assert len(batchnorm.__all__) == len(PUBLIC_NAMES)
    assert set(dir(batchnorm)) >= PUBLIC_NAMES


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


IMPORT_AND_REPORT = """
import json, sys
import torch
before = set(sys.modules)
import batchnorm
after = set(sys.modules)
print(json.dumps({
    "by_torch": sorted(before),
    "by_batchnorm": sorted(after - before),
    "cuda_initialized": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def fresh_import():
    """What `import batchnorm` loads in a process that has already imported torch."""
    run = subprocess.run([sys.executable, "-c", IMPORT_AND_REPORT], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_loads_nothing_but_torch_and_numpy(fresh_import):
    packages = {module.partition(".")[0] for module in fresh_import["by_batchnorm"]}
    # The editable install's own import hook is no part of the package.
    installed_by = {name for name in packages if name.startswith("_editable_")}
    assert packages - sys.stdlib_module_names - installed_by <= {"batchnorm", "torch", "numpy"}


def test_import_loads_neither_compilers_nor_the_command_line(fresh_import):
    late = [
        "batchnorm.cli",
        "batchnorm.compare",
        "torch._dynamo",
        "torch._inductor",
        "torch.export",
        "torch.onnx",
        "torch.testing",
    ]
    loaded = [m for m in fresh_import["by_batchnorm"] if any(f"{m}.".startswith(f"{name}.") for name in late)]
    assert loaded == []


def test_import_is_small_beside_torch(fresh_import):
    # Modules, not seconds: a count is the same on every machine.
    assert len(fresh_import["by_batchnorm"]) < len(fresh_import["by_torch"]) / 10


def test_import_does_not_initialise_cuda(fresh_import):
    assert not fresh_import["cuda_initialized"]


def python_examples(page: Path) -> list[tuple[int, str]]:
    """The page's fenced Python blocks, each with the line it starts on."""
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block.group(1)) for block in blocks]


@pytest.mark.parametrize("page", [p for p in PAGES if python_examples(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, source in python_examples(page):
        # The blank lines make a traceback name the page's own line.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


def test_readme_has_an_example():
    assert python_examples(ROOT / "README.md")
