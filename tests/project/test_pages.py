"""The Python blocks of the README and of the documentation's pages run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm
from tests.keras.backends import UNOPTIMIZED

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "learn")]


def python_examples(page: Path) -> list[tuple[int, str]]:
    """The page's fenced Python blocks, each with the line it starts on."""
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block.group(1)) for block in blocks]


def run_examples(page: Path) -> None:
    """Run the page's blocks, in order, as one program."""
    namespace = {"__name__": "__main__"}
    for line, source in python_examples(page):
        # The blank lines make a traceback name the page's own line.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


OTHER_FRAMEWORKS = re.compile(r"^ *(?:import|from) (?:batchnorm(?:\.| import ))?(jax|flax|equinox|keras)\b", re.M)


def other_frameworks(page: Path) -> set[str]:
    return {name for _, source in python_examples(page) for name in OTHER_FRAMEWORKS.findall(source)}


def missing(page: Path) -> list[str]:
    return [name for name in sorted(other_frameworks(page)) if importlib.util.find_spec(name) is None]


WITH_EXAMPLES = [page for page in PAGES if python_examples(page)]
# Imports the frameworks once, and runs each page in a process of its own, which prints its traceback.
IN_FORKS = """
import os, sys, traceback
import {imports}
from tests.project.test_pages import Path, run_examples
for page, folder in {pages}:
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        try:
            run_examples(Path(page))
        except BaseException:
            Path("failed").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        Path(folder, "failed").write_text("the process was killed")
"""


@pytest.fixture(scope="module")
def failures_of_other_frameworks(tmp_path_factory) -> dict[Path, str]:
    """The tracebacks of the pages of other frameworks than torch; empty for those that run.

    In other processes, because JAX starts threads, and Keras chooses its backend when it is imported.
    """
    pages = [page for page in WITH_EXAMPLES if other_frameworks(page) and not missing(page)]
    folders = [tmp_path_factory.mktemp(page.stem) for page in pages]
    imports = sorted(set().union(*map(other_frameworks, pages)))
    environment = {"KERAS_BACKEND": "torch", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["XLA_FLAGS"] = UNOPTIMIZED
    named = [(str(page), str(folder)) for page, folder in zip(pages, folders, strict=True)]
    program = IN_FORKS.format(imports=", ".join(imports), pages=named)
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    failed = [folder / "failed" for folder in folders]
    return {page: file.read_text() if file.exists() else "" for page, file in zip(pages, failed, strict=True)}


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_examples_of_a_page_run(page, tmp_path, monkeypatch, request):
    if names := missing(page):
        pytest.skip(f"not installed: {', '.join(names)}")
    if other_frameworks(page):
        failure = request.getfixturevalue("failures_of_other_frameworks")[page]
        assert not failure, failure
        return
    monkeypatch.chdir(tmp_path)
    try:
        run_examples(page)
    finally:
        batchnorm.keep_memory(False)  # some pages turn it on


def test_readme_has_an_example():
    assert python_examples(ROOT / "README.md")
