"""The parts of README and documentation that are generated or quoted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["summary", "networks-summary"])
def test_readme_quotes_the_measured_speedups(name: str) -> None:
    summary = (ROOT / f"benchmarks/results/{name}.md").read_text(encoding="utf-8")
    assert summary.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_begins_with_the_speedup_of_large_tensors() -> None:
    summary = (ROOT / "benchmarks/results/summary.md").read_text(encoding="utf-8")
    mean, low, high = re.search(r"float32 \| contiguous \|.*\| ([\d.]+×) \(([\d.]+) to ([\d.]+)\)", summary).groups()
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[0]
    assert f"{mean[:-1]}× as fast as torch's ({low}× to {high}×)" in first


def test_cited_sections_of_the_mathematics_and_the_tutorial_exist() -> None:
    pages = {"mathematics page": ["docs/mathematics.md"], "tutorial": sorted(ROOT.glob("docs/learn/*.md"))}
    headings = {
        name: {re.sub(r"^#+ (\d+\. )?", "", line) for path in paths for line in _lines(path) if line.startswith("#")}
        for name, paths in pages.items()
    }
    cited = []
    for path in sorted(path for folder in ("src", "csrc") for path in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".h", ".cpp"):
            text = re.sub(r"\s+(// |# )?", " ", path.read_text(encoding="utf-8"))
            found = re.findall(r"(mathematics page|tutorial), [“\"]([^”\"]+)[”\"]", text)
            cited += [(path.name, name, section) for name, section in found]
    assert {name for _, name, _ in cited} == set(pages)
    assert [citation for citation in cited if citation[2] not in headings[citation[1]]] == []


def _lines(path: Path | str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def test_every_command_and_option_is_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import command_pages

    from batchnorm.cli.app import app

    text = command_pages.on_page_markdown("# Commands\n\n<!-- commands -->\n")
    for name, command in app.commands.items():
        section = text.split(f"\n## batchnorm {name}\n")[1].split("\n## ")[0]
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("-")):
            assert re.search(rf"^  (-\w, )?{option}\b", section, re.MULTILINE), (name, option)
    assert command_pages.on_page_markdown("# Other page") == "# Other page"


def test_charts_link_to_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import linked_images

    chart = '<img alt="Time" src="images/time.png" />'
    page = f'<p>{chart}<img src="images/drawing.svg" /></p>'
    assert linked_images.on_page_content(page) == page.replace(chart, f'<a href="images/time.png">{chart}</a>')


def test_links_of_the_pages_beside_the_readme_work_in_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import root_pages

    generated = {name.lower(): (ROOT / name).read_text(encoding="utf-8") for name in root_pages.NAMES}
    for text in generated.values():
        for target in re.findall(r"\]\(([^)#]+)", root_pages.content(text)):
            assert target.startswith("https://") or target in generated or (ROOT / "docs" / target).is_file(), target
