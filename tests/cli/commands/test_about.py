"""The versions, and completion in the shell."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from batchnorm._version import __version__
from batchnorm.cli.app import app

WITHOUT_FRAMEWORKS = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None  # importing them fails
from batchnorm import cli
cli.main(["--version"])
"""


def test_the_versions_need_no_framework() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_FRAMEWORKS], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    held = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert held["batchnorm"] == __version__
    assert held["kernels"] and held["torch"][0].isdigit()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_the_shell_is_printed(shell: str) -> None:
    result = CliRunner().invoke(app, ["completion", shell], prog_name="batchnorm")
    assert result.exit_code == 0
    assert f"_BATCHNORM_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "recal", [("plain", "recalibrate")]),
        (["doctor"], "--fail", [("plain", "--fail-on")]),
        (["doctor", "net:build", "--fail-on"], "w", [("plain", "warning")]),
        (["doctor", "net:build", "--data"], "mi", [("file", "mi")]),
        (["fold"], "mo", [("file", "mo")]),
    ],
)
def test_words_are_completed(words: list[str], incomplete: str, expected: list[tuple[str, str]]) -> None:
    found = BashComplete(app, {}, "batchnorm", "_BATCHNORM_COMPLETE").get_completions(words, incomplete)
    assert [(item.type, item.value) for item in found] == expected
