"""The documentation of the doctor's rules, read from their source without importing them or a framework."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "doctor" / "rules"


@dataclass(frozen=True)
class RuleText:
    """The documentation of a rule, in Markdown; `batchnorm.doctor.rules.Rule` documents the attributes."""

    code: str
    title: str
    why: str
    evidence: str
    severity: str
    repair: str
    source: str
    repair_keras: str = ""
    notes: str = ""
    needs: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the page of the rule."""
        parts = [f"# {self.code}: {self.title}", self.why]
        parts += ["## Evidence", self.evidence, "## Severity", self.severity, "## Fix", f"```py\n{self.repair}\n```"]
        parts += ["In Keras:", f"```py\n{self.repair_keras}\n```"] if self.repair_keras else []
        parts += ["## Notes", self.notes] if self.notes else []
        return "\n\n".join([*parts, "## Source", self.source]) + "\n"


@cache
def rule_texts() -> dict[str, RuleText]:
    """Return the documentation of every rule by its code, in the order of the codes."""
    texts = (_read(path) for path in _FOLDER.glob("*/bn*.py"))
    return {text.code: text for text in sorted(texts, key=lambda text: text.code)}


def _read(path: Path) -> RuleText:
    """Read the attributes of the only class in a file."""
    (rule,) = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    assigned = {
        statement.targets[0].id: statement.value
        for statement in rule.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    values = {name: ast.literal_eval(assigned[name]) for name in RuleText.__dataclass_fields__ if name in assigned}
    found: dict[str, Any] = {
        name: inspect.cleandoc(value) if isinstance(value, str) else value for name, value in values.items()
    }
    found["why"] = " ".join(found["why"].split())
    return RuleText(**found)
