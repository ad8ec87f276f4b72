"""Print the requirements of a part of .venv, so that `make` installs it again only if they changed.

    python scripts/requirements.py NAME

NAME is an extra, whose requirements are printed one a line; `torch`, `constraints` (all pins but torch's) or `package`
(what pyproject.toml says about the package itself and its build).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]


def requirements(project: dict[str, Any], extra: str) -> Iterator[str]:
    """Yield the requirements of an extra, and of the extras that it names, except torch."""
    for requirement in project["dependencies"] + project["optional-dependencies"][extra]:
        if own := re.fullmatch(rf"{project['name']}\[(.*)\]", requirement):
            for name in own[1].split(","):
                yield from requirements(project, name.strip())
        elif not re.match(r"torch\b", requirement):
            yield requirement


def lines(name: str) -> list[str]:
    """Return the lines for a name."""
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    project = configuration["project"]
    if name == "torch":
        return [pin for pin in pins if pin.startswith("torch==")]
    if name == "constraints":
        return [pin for pin in pins if not pin.startswith("torch==")]
    if name == "package":
        parts = [configuration["build-system"], project, configuration["tool"]["scikit-build"]]
        return [json.dumps(part, indent=1, sort_keys=True) for part in parts]
    return sorted(set(requirements(project, name)))


if __name__ == "__main__":
    print("\n".join(lines(sys.argv[1])))
