"""Names with control characters, in every report that is printed or shown."""

from __future__ import annotations

import json
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import cli
from batchnorm.doctor.report.terminal import layer_table
from batchnorm.text import printable

# A colour, a faked line, a terminal's 8-bit command, a mark that reverses text, another kind of line break.
HOSTILE = "n\x1b[31m\nerror BN999 faked\x9b2J\u202e\u2028"
ESCAPED = "n\\x1b[31m\\nerror BN999 faked\\x9b2J\\u202e\\u2028"


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = [
        (f"conv{HOSTILE}", nn.Conv2d(3, 4, 3)),
        (HOSTILE, nn.BatchNorm2d(4)),
        ("relu", nn.ReLU()),
        (f"last{HOSTILE}", nn.BatchNorm2d(4)),
    ]
    net = nn.Sequential(OrderedDict(parts))
    net[1].running_var[1] = float("nan")
    net[3].eval()
    return net


def batches() -> list[torch.Tensor]:
    return [torch.randn(8, 3, 6, 6) + 3 for _ in range(3)]


def assert_safe(text: str) -> None:
    assert text == printable(text, lines=True)
    assert not any(line.strip().startswith("error BN999") for line in text.splitlines())
    assert ESCAPED in text


@pytest.mark.parametrize("text", ["", "layer1.0.bn2", "größe γ −", "a\\x1b"])
def test_ordinary_text_stays(text: str) -> None:
    assert printable(text) == text


def test_control_characters_are_escaped_once() -> None:
    assert printable(HOSTILE) == ESCAPED == printable(printable(HOSTILE))
    assert printable("half a pair \ud800") == "half a pair \\ud800"
    assert printable("a\nb\tc", lines=True) == "a\nb\\tc"


def test_a_diagnosis_is_safe_to_print_and_to_show(tmp_path: Path) -> None:
    from rich.console import Console

    for data in (None, batches()):
        found = bn.diagnose(model(), data)
        assert HOSTILE in {path for finding in found.findings for path in finding.paths}  # for programs
        assert_safe(str(found))
        page = found.to_html()
        assert not any(character in page for character in "\x1b\x9b\u202e\u2028")
        assert ESCAPED in page
        console = Console(width=500, file=sys.stdout, record=True)
        console.print(found)
        assert_safe(console.export_text())
        found.save(tmp_path / "a.html")
        found.save(tmp_path / "a.txt")
        assert_safe((tmp_path / "a.txt").read_text(encoding="utf-8"))
        assert json.loads(found.to_json())["layers"][0]["path"] == HOSTILE


def test_the_table_of_layers_is_safe(capsys) -> None:
    from rich.console import Console

    from batchnorm.doctor.pytorch.inspection import inspect_layers

    console = Console(width=900, file=sys.stdout, record=True)
    console.print(layer_table(inspect_layers(model(), (torch.randn(2, 3, 6, 6),))))
    assert_safe(console.export_text())


def test_reports_of_changes_are_safe() -> None:
    healthy = model()
    healthy[1].reset_running_stats()
    x = torch.randn(2, 3, 6, 6)
    for report in (
        bn.accelerate(healthy, (x,)).report,
        bn.fold(healthy.eval(), (x,)).report,
        bn.recalibrate(healthy, batches()).report,
        bn.convert(healthy, "BatchRenorm").report,
        bn.freeze(healthy).report,
    ):
        assert_safe(str(report))


def test_warnings_and_tables_of_a_watch_are_safe() -> None:
    net = model().train()
    net[1].reset_running_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        with bn.watch(net, every=1) as watch:
            for x in batches():
                net(x * 50).sum().backward()
                optimizer.step()
    assert_safe(str(watch))
    for warning in caught:
        assert_safe(str(warning.message))


def test_commands_print_nothing_raw(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net_for_text.py").write_text("from tests.test_text import model, batches\n")
    for words in (
        ["doctor", "net_for_text:model"],
        ["doctor", "net_for_text:model", "--json"],
        ["inspect", "net_for_text:model"],
        ["accelerate", "net_for_text:model"],
        ["recalibrate", "net_for_text:model", "--data", "net_for_text:batches", "--only", "none", "-o", "f.pth"],
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        out, err = capsys.readouterr()
        for text in (out, err):
            assert text == printable(text, lines=True)
    sys.modules.pop("net_for_text")
