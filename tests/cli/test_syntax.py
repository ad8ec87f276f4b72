from __future__ import annotations

import builtins
import sys

import pytest
from click.testing import CliRunner

from batchnorm import cli
from batchnorm.cli.app import app
from batchnorm.cli.commands.compare import compare
from batchnorm.cli.syntax import repeat_options


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--norms none batch --lr 1", "--norms none --norms batch --lr 1"),
        ("--lr 1 --norms none", "--lr 1 --norms none"),
        ("--norms none,batch", "--norms none,batch"),
        ("--norms none --norms batch", "--norms none --norms batch"),
        ("--norms=none batch -h", "--norms=none --norms batch -h"),
        ("--lr 1 stray", "--lr 1 stray"),
    ],
)
def test_an_option_takes_every_argument_up_to_the_next(words, expected):
    assert repeat_options(words.split(), {"--norms"}) == expected.split()


@pytest.mark.parametrize("words", [
    "--lr 0.1 0.5 --model mlp cnn --batch-size 8 64 --norms renorm:rmax=3,dmax=5 batch",
    "--lr 0.1,0.5 --model mlp,cnn --batch-size=8, 64 --norms renorm:rmax=3,dmax=5 batch",
    "--lr 0.1 --lr=0.5 --model mlp, cnn --batch-size 8,64 --norms renorm:rmax=3,dmax=5 batch",
])  # fmt: skip
def test_spaces_and_commas_separate_the_values_of_an_option(words):
    found = compare.make_context("compare", words.split()).params
    assert found["lr"] == (0.1, 0.5) and found["model"] == ("mlp", "cnn") and found["batch_size"] == (8, 64)
    assert found["norms"] == ("renorm:rmax=3,dmax=5", "batch")
    assert found["sampling"] == ("iid",)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["comp"], "batchnorm: No such command 'comp'"),
        (["--bogus"], "batchnorm: No such option '--bogus'"),
        (["compare", "--bogus"], "batchnorm compare: No such option '--bogus'"),
        (["compare", "stray"], "batchnorm compare: Got unexpected extra argument (stray). See"),
        (
            ["compare", "--norms"],
            "batchnorm compare: Option '--norms' requires an argument. See batchnorm compare --help",
        ),
        (
            ["compare", "--norms", "--out", "result"],
            "batchnorm compare: Option '--norms' requires an argument. See batchnorm compare --help",
        ),
        (["compare", "--lr", ","], "batchnorm compare: Invalid value for '--lr': it has no value. Write one, or leave"),
        (["compare", "--lr", "high"], "batchnorm compare: Invalid value for '--lr': 'high' is not a valid float"),
    ],
)
def test_a_usage_error_is_one_line(capsys, words, line):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.startswith(line.removesuffix(" See"))
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["compare", "--help"], ["--version"]])
def test_help_and_version_end_well(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    out, err = capsys.readouterr()
    assert not exit_.value.code
    assert "batchnorm" in out
    assert err == ""


def test_a_missing_command_line_package_is_reported_in_one_line(capsys, monkeypatch):
    import_ = builtins.__import__

    def without_click(name, *arguments, **options):
        if name == "click":
            raise ModuleNotFoundError("No module named 'click'", name="click")
        return import_(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_click)
    for name in [name for name in sys.modules if name.startswith("batchnorm.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compare"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "batchnorm: the command line needs the package click, which cannot be imported. Install it with: "
        "pip install 'batchnorm[compare]'\n"
    )


@pytest.mark.parametrize("verb", ["accelerate", "compare", "doctor", "fold", "inspect", "recalibrate", "standardize"])
def test_examples_in_the_help_keep_their_lines(verb: str) -> None:
    text = CliRunner().invoke(app, [verb, "--help"], prog_name="batchnorm").output
    examples = [line for line in text.splitlines() if line.startswith(f"    batchnorm {verb}")]
    assert examples
    assert "\\b" not in text


def test_the_list_of_commands_describes_each() -> None:
    text = CliRunner().invoke(app, ["--help"], prog_name="batchnorm").output
    assert "..." not in text.partition("Commands:")[2]
