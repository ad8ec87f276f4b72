"""Objects that the user names as `module.path:name`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from batchnorm.importing import attribute_of, import_module, is_named


def test_modules_of_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_for_a_test.py").write_text("class A:\n    b = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "named_for_a_test", raising=False)
    before = list(sys.path)
    module = import_module("named_for_a_test:A.b")
    assert attribute_of(module, "named_for_a_test:A.b") == 3 and sys.path == before
    with pytest.raises(AttributeError, match="named_for_a_test has no 'Ab'. Did you mean A?"):
        attribute_of(module, "named_for_a_test:Ab")


@pytest.mark.parametrize("written", ["net", "net:", ":build", "net:build/", "my-net:build"])
def test_other_texts_are_not_names(written: str) -> None:
    assert not is_named(written) and is_named("a.b:c.d")
