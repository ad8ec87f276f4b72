"""Render self-contained HTML pages, for the reports of `compare` and `doctor`. This module needs jinja2."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jinja2

from batchnorm.text import printable

# In the order of execution: the libraries, then the code that all charts share.
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "chart.js")
_SHARED = "batchnorm"


def render(package: str, charts: Any, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """Return the page as text. Inserted values are escaped, and only this library's scripts can run.

    Args:
        package: The package with a folder `web` that contains `report.html.j2` (which extends `page.html.j2`),
            `report.css` and `report.js`.
        charts: Plain values that `report.js` reads as `page.charts`; numbers that are not finite become null.
        filters: Filters for the template, in addition to `number`.
        **values: Variables of the template; a missing variable is an error.
    """
    loader = jinja2.FunctionLoader(lambda name: _read(_SHARED if name == "page.html.j2" else package, name))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_function"] = _dumps
    environment.filters |= {"number": number, **(filters or {})}
    environment.finalize = _printable
    scripts = [_read(_SHARED, name) for name in SCRIPTS] + [_read(package, "report.js")]
    return environment.get_template("report.html.j2").render(
        charts=charts,
        styles=[_read(_SHARED, "base.css"), _read(package, "report.css")],
        scripts=scripts,
        policy=_policy(scripts),
        **values,
    )


def number(value: float | None) -> str:
    """Format a number with three significant digits and a true minus sign."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def short(value: float) -> float:
    """Round a number to four significant digits, which is enough for a chart."""
    return float(f"{value:.4g}")


def _policy(scripts: list[str]) -> str:
    """Return a content security policy that allows only these scripts and loads nothing, in case escaping fails."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'; form-action 'none'"


def _dumps(value: Any, **options: Any) -> str:
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, str):
        return printable(value, lines=True)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _printable(value: Any) -> Any:
    return printable(value, lines=True) if type(value) is str else value


def _read(package: str, name: str) -> str:
    return (resources.files(package) / "web" / name).read_text(encoding="utf-8")
