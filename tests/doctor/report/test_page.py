"""The HTML page: its structure, that it is self-contained, and that user input is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import cli
from batchnorm.doctor import Diagnosis, Severity, diagnose
from batchnorm.doctor.report import page
from batchnorm.doctor.rules import load_rules
from batchnorm.doctor.wording import counted
from tests.doctor.networks import Plain, batches, criterion, trained
from tests.doctor.report.parsed import Page, charts_of


@pytest.fixture(scope="module")
def sick() -> Diagnosis:
    """Statistics of another scale in one block, dead channels, a bias, and weight decay."""
    model = trained("plain")
    with torch.no_grad():
        model.blocks[2][1].running_mean += 2 * model.blocks[2][1].running_var.sqrt()
        model.blocks[3][1].weight[::2] = 1e-7
    model.blocks[1][0].bias = nn.Parameter(torch.zeros(16))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    return diagnose(model, batches(6, 32), loss=criterion, optimizer=optimizer)


@pytest.fixture(scope="module")
def html(sick: Diagnosis) -> str:
    return sick.to_html()


def test_the_page_needs_nothing_else(html: str) -> None:
    parsed = Page(html)
    assert not parsed.unclosed
    assert not {tag for tag, *_ in parsed.elements} & {"link", "img", "iframe", "object", "base", "form"}
    addresses = [a[name] for _, a, _ in parsed.elements for name in ("src", "href", "action") if name in a]
    assert addresses and all(address.startswith(("#finding-", "#rule-")) for address in addresses)
    assert not re.search(r"url\(|@import", "".join(text for _, text in parsed.all("style")))
    assert len(html) < 850_000


def test_only_our_own_scripts_run(html: str) -> None:
    policy = next(a["content"] for a, _ in Page(html).all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy and "unsafe" not in policy.partition("script-src")[2]
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts} == allowed
    assert len(scripts) == 4


def test_the_verdict_names_the_worst_and_where_to_start(sick: Diagnosis, html: str) -> None:
    ((attributes, text),) = Page(html).all("div", "verdict")
    assert "error" in attributes["class"]
    worst = sick.findings[0]
    assert worst.severity == Severity.ERROR
    assert text.startswith(f"{sick.model} has ") and worst.title in text and worst.summary[1:] in text
    assert "Start with the fix for BN102" in text and "batchnorm.recalibrate" in text


def test_every_layer_is_a_box_as_bad_as_its_worst_finding(sick: Diagnosis, html: str) -> None:
    boxes = Page(html).all("button", "box")
    assert len(boxes) == len(sick.layers) == 6
    for layer, (attributes, _) in zip(sick.layers, boxes, strict=True):
        named = [f.severity for f in sick.findings if layer.path in f.paths]
        health = max(named).label if named else "ok"
        assert attributes["class"] == f"box {health}"
        assert attributes["aria-label"].startswith(f"{layer.path}: ")
    assert boxes[2][0]["class"] == "box error"


def test_a_finding_on_what_computes_the_input_marks_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    found = diagnose(model.train(), list(torch.randn(2, 16, 3, 8, 8)))
    (bias,) = [finding for finding in found.findings if finding.code == "BN110"]
    assert bias.paths == ("0",)
    first, second = page.rows_of(found)
    assert bias in first.findings and bias not in second.findings


def test_the_keyboard_reaches_strip_and_copy_buttons(sick: Diagnosis, html: str) -> None:
    parsed = Page(html)
    stops = [a for a, _ in parsed.all("button", "box") if a["tabindex"] == "0"]
    assert len(stops) == 1 and stops[0]["aria-pressed"] == "true"
    assert stops[0]["data-layer"] == str(charts_of(html)["chosen"]) == "2"
    copies = parsed.all("button", "copy")
    assert len(copies) == 1 + sum(page.is_code(finding.repair) for finding in sick.findings)
    assert all("hidden" in a and "tabindex" not in a for a, _ in copies)  # shown by the script, which they need
    assert len({a["aria-label"] for a, _ in copies}) == len(copies)
    ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {a["href"].removeprefix("#") for a, _ in parsed.all("a")} <= set(ids)


def test_findings_stand_with_evidence_cost_confidence_and_repair(sick: Diagnosis, html: str) -> None:
    articles = [text for _, text in Page(html).all("article", "finding")]
    assert len(articles) == len(sick.findings) > 3
    why = {rule.code: rule.why for rule in load_rules()}
    for finding, text in zip(sick.findings, articles, strict=True):
        expected = [finding.code, finding.title, finding.summary, why[finding.code], f"Confidence{finding.confidence}"]
        expected += [*finding.evidence, *(page.cost(finding) or ["not measured"])]
        expected += [line.strip() for line in finding.repair.splitlines() if not line.startswith("#")]
        for words in expected:
            assert " ".join(words.split()) in text


def test_the_charts_show_what_was_measured(sick: Diagnosis, html: str) -> None:
    drawn = charts_of(html)
    assert drawn["batch_size"] == 32
    for layer, facts, measures in zip(drawn["layers"], sick.layers, sick.measures, strict=True):
        held = sick.channels[facts.path]
        assert layer["divergence"] == pytest.approx(measures.divergence, rel=1e-3)
        assert layer["noise"] == pytest.approx(measures.noise, rel=1e-3) and 0 < layer["noise"] < 1
        for name in ("running_mean", "running_var", "mean", "var"):
            assert layer["channels"][name] == pytest.approx(getattr(held, name).tolist(), rel=1e-3, abs=1e-12)
        assert sum(layer["gamma"]["counts"]) == sum(layer["beta"]["counts"]) == facts.channels
    divergences = [layer["divergence"] for layer in drawn["layers"]]
    assert divergences.index(max(divergences)) == 2
    assert {a["data-chart"] for a, _ in Page(html).all("figure")} == {"depth", "noise", "mean", "var", "gamma", "beta"}


def test_channels_are_those_of_the_data_and_stay_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(64, 4)
    found = diagnose(model, x.split(16))
    held = found.channels["0"]
    assert np.allclose(held.mean, x.mean(0).numpy(), atol=1e-6)
    assert np.allclose(held.var, x.var(0, correction=0).numpy(), atol=1e-6)
    model[0].weight.data.zero_()
    assert held.weight.tolist() == [1, 1, 1, 1]


def test_without_data_sections_say_so_in_a_line() -> None:
    found = diagnose(Plain())
    html = found.to_html()
    parsed = Page(html)
    lines = [text for _, text in parsed.all("p", "none")]
    assert len(lines) == 3 and all("no data were given (data=)" in line for line in lines)
    assert {a["data-chart"] for a, _ in parsed.all("figure")} == {"gamma", "beta"}
    assert all(layer["channels"] is None for layer in charts_of(html)["layers"])
    (section,) = [text for _, text in parsed.all("section") if text.startswith("What was not checked")]
    assert section.count("Needs data (data=).") == 1  # a reason is given once, for all its rules
    for rule in found.not_checked:
        assert f"{rule.code} {rule.title}" in section and rule.reason[1:] in section


def test_it_says_what_it_was_measured_on(sick: Diagnosis, html: str) -> None:
    facts = " ".join(text for _, text in Page(html).all("dd"))
    assert "192 samples in 6 batches of 32" in facts
    for words in (torch.__version__, bn.__version__, sick.conditions.time, "float32 on cpu"):
        assert words in facts


EVIL = "<script>alert(1)</script>"


def test_what_the_user_wrote_is_escaped() -> None:
    norm = type(EVIL, (nn.BatchNorm2d,), {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x)})
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.add_module(EVIL, norm(4))
    model.add_module("</script>&<!--", nn.BatchNorm2d(4))

    def loss(y, x):
        if y.requires_grad:  # in the training step, whose failure is listed under the rules that were not checked
            raise RuntimeError(f"</script>{EVIL}")
        return y.square().mean()

    found = diagnose(model, [torch.randn(8, 3, 6, 6) for _ in range(3)], loss=loss)
    assert any(EVIL in rule.reason for rule in found.not_checked)
    html = found.to_html()
    assert EVIL not in html and "<!--" not in html.partition("<body>")[2].partition("<script")[0]
    parsed = Page(html)
    assert len(parsed.all("script")) == 5 and not parsed.unclosed
    assert [layer["path"] for layer in charts_of(html)["layers"]] == [EVIL, "</script>&<!--"]
    assert any(EVIL in text for _, text in parsed.all("th"))
    assert any(EVIL in text for _, text in parsed.all("dd"))


def test_numbers_that_are_not_finite_are_left_out_and_reported() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[0].running_var[1] = torch.nan
    model[1].weight.data[:] = torch.inf
    html = diagnose(model, list(torch.randn(4, 16, 4))).to_html()
    first, second = charts_of(html)["layers"]  # which json.loads reads, as NaN is none of JSON's
    assert first["channels"]["running_var"][1] is None
    assert second["gamma"] == {"number": 4, "not_finite": 4, "low": 0.0, "high": 1.0, "counts": []}
    assert "not finite" in html


def test_of_many_channels_the_worst_layers_have_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_CHANNELS", 100)
    monkeypatch.setattr(page, "_FARTHEST", 8)
    model = nn.Sequential(nn.BatchNorm1d(80), nn.BatchNorm1d(80))
    with torch.no_grad():
        model[1].running_mean += 3
        model[0].running_mean[40:44] += 0.5
    data = list(torch.randn(4, 64, 80))
    for layer in model:
        layer.running_var.fill_(1.0)
    first, second = charts_of(diagnose(model, data).to_html())["layers"]
    assert len(second["channels"]["index"]) == 80
    assert len(first["channels"]["index"]) == 8 and {40, 41, 42, 43} <= set(first["channels"]["index"])
    assert sum(first["gamma"]["counts"]) == 80  # the distributions are those of all


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1"], ["bn1", "layer1", "layer2"]),
        (["net.stem.bn", "net.body.0.bn", "net.body.1.bn", "net.head.bn"], ["net.stem", "net.body", "net.head"]),
        ([str(k) for k in range(30)], [""]),
        ([f"{k}.bn" for k in range(30)], [""]),
        (["(model)"], [""]),
    ],
)
def test_the_strip_is_cut_where_names_tell_parts_apart(names: list[str], expected: list[str]) -> None:
    rows = [page.Row(number, name, "ok", (), {}) for number, name in enumerate(names)]
    found = page.parts(rows)
    assert [name for name, _ in found] == expected
    assert [row for _, members in found for row in members] == rows


def test_one_is_no_plural() -> None:
    assert (counted(1, "layer"), counted(2, "layer"), counted(0, "batch")) == ("1 layer", "2 layers", "0 batches")
    assert [counted(n, "layer moves", "layers move") for n in (1, 3)] == ["1 layer moves", "3 layers move"]
    model = nn.Sequential(nn.BatchNorm1d(4, eps=0.5), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[0].running_var[0] = -1.0
    model[2].weight.data[:3] = 0.0
    found = diagnose(model, [torch.randn(1, 4)])
    assert len(found.findings) > 3
    assert not re.search(r"\b1 (layers|channels|batches|samples|notes|errors)\b", str(found))


def test_layers_that_cannot_be_measured_are_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.domains = bn.DomainBatchNorm2d(3, num_domains=2)
            self.white, self.plain, self.unused = bn.DecorrelatedBatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.plain(self.white(self.domains(x, domain=1)))

    found = diagnose(Odd(), [torch.randn(16, 3, 5, 5) for _ in range(3)])
    left = {rule.paths: rule.reason for rule in found.not_checked if rule.paths}
    assert set(left) == {("domains",), ("white",), ("unused",)}
    assert "statistics of 2 domains" in left["domains",]
    assert "whitens" in left["white",]
    assert "did not reach it" in left["unused",]
    assert [m.divergence is None for m in found.measures] == [True, True, False, True]
    assert "1 layer of 4 could be compared" in Page(found.to_html()).all("body")[0][1]
    assert found.summary().endswith("4 layers, 48 samples in 3 batches")
    assert all(not rule.paths for rule in diagnose(Odd()).not_checked)


def test_a_page_is_written_whole_or_not_at_all(
    sick: Diagnosis, html: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sick.save(tmp_path / "bn.html")
    assert (tmp_path / "bn.html").read_text(encoding="utf-8") == html + "\n"
    monkeypatch.setattr(page, "charts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sick.save(tmp_path / "bn.html")
    assert (tmp_path / "bn.html").read_text(encoding="utf-8") == html + "\n"
    with pytest.raises(ZeroDivisionError):
        sick.save(tmp_path / "other.html")
    assert [path.name for path in tmp_path.iterdir()] == ["bn.html"]


def test_without_jinja2_the_page_raises_an_error_that_says_what_to_install(
    sick: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"expects jinja2 .* pip install jinja2 markdown-it-py, or save it as .json"):
        sick.save(tmp_path / "bn.html")
    assert not list(tmp_path.iterdir())
    sick.save(tmp_path / "bn.json")


NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
"""


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", *words])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"page_net_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETWORK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return f"{name}:build"


def test_the_command_writes_the_page(network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([network, "--html", "bn.html", "--json", "-o", "bn.txt"], capsys)
    assert (code, err) == (0, "")
    assert json.loads(out)["model"] == "Sequential"
    assert len(Page((tmp_path / "bn.html").read_text(encoding="utf-8")).all("button", "box")) == 1
    assert (tmp_path / "bn.txt").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--html", "bn.pdf"], "--html must end in .html, got bn.pdf"),
        (["--html", "none/bn.html"], "none/bn.html must be in a directory that exists"),
        (
            ["-o", "bn.html"],
            "--output must end in .json or .txt, got bn.html. Change the name, or use --html for a page.",
        ),
    ],
)
def test_an_invalid_path_is_an_error_before_anything_runs(
    network: str, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    code, out, err = run([network, *words], capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"batchnorm doctor: {line}") and err.count("\n") == 1


def test_the_command_reports_that_jinja2_is_missing(
    network: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = run([network, "--html", "bn.html"], capsys)
    assert code == 2
    assert err == (
        "batchnorm doctor: jinja2, which renders the page, is not installed. Run pip install 'batchnorm[doctor]'.\n"
    )
    assert run([network], capsys)[0] == 0


def test_a_page_that_cannot_be_written_leaves_what_is_printed(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Diagnosis, path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Diagnosis, "save", full)
    code, out, err = run([network, "--html", "bn.html"], capsys)
    assert code == 2
    assert "BN110" in out
    assert err == "batchnorm doctor: bn.html could not be written: OSError: no space left\n"
