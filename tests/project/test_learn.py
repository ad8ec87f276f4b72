"""The pages of "Learn" as notebooks: made from the pages, they run and print what they show."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import learn_pictures  # noqa: E402
import notebooks  # noqa: E402

PAGES = notebooks.pages()


@pytest.mark.parametrize("word", ["freeze", "fuse", "fusing", "notebook", "tutorial"])
def test_the_search_finds(word: str) -> None:
    """The site's search compares whole words, without stemming."""
    pages = [*PAGES, notebooks.FOLDER / "index.md"]
    assert any(re.search(rf"\b{word}\b", page.read_text(), re.IGNORECASE) for page in pages)


def test_every_picture_is_shown_and_drawn_by_the_script() -> None:
    shown = {name for page in PAGES for name in re.findall(r"images/learn/(\w+)\.svg", page.read_text())}
    committed = {file.stem for file in learn_pictures.FOLDER.iterdir()}
    assert shown == committed == {draw.__name__ for draw in learn_pictures.PICTURES}


def test_pictures_have_colors_for_light_and_dark() -> None:
    style, _, rest = learn_pictures.svg(learn_pictures.computes).partition("</style>")
    for name, pair in learn_pictures.COLORS.items():
        assert all(f"--{name}:{color}" in style for color in pair)
    assert "fill: var(--blue)" in rest and not re.findall(r"#[0-9a-f]{6}\b", rest)


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (notebooks.FOLDER / "index.md").read_text()
    for page in PAGES:
        assert f"]({page.name})" in contents and f"]({page.stem}.ipynb)" in contents


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_notebook_is_made_from_its_page(page: Path) -> None:
    assert page.with_suffix(".ipynb").read_text() == notebooks.text(page), "run: make notebooks"


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_notebook_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    notebook = nbformat.read(page.with_suffix(".ipynb"), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{page.name}, {cell.id}", "exec"), namespace)
            assert capsys.readouterr().out == "".join(output.text for output in cell.outputs), cell.source
