"""A hook of mkdocs that makes the page of each rule of the doctor, their table and their navigation from the rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from batchnorm.doctor.rules import Rule, load_rules

# What a user has to provide for a need, from the most to the least demanding.
NEEDS = {
    ("data", "output", "pass", "step"): "data",
    ("optimizer",): "the optimizer",
    ("ranks",): "the processes",
}


def page(rule: type[Rule]) -> str:
    """Return the Markdown page of a rule."""
    parts = [f"# {rule.code}: {rule.title}", rule.why]
    parts += ["## Evidence", rule.evidence, "## Severity", rule.severity, "## Fix", f"```py\n{rule.repair}\n```"]
    parts += ["In Keras:", f"```py\n{rule.repair_keras}\n```"] if rule.repair_keras else []
    parts += ["## Notes", rule.notes] if rule.notes else []
    return "\n\n".join([*parts, "## Source", rule.source]) + "\n"


def table() -> str:
    """Return the Markdown table of all rules."""
    rows = ["| code | finding | needs |", "|---|---|---|"]
    for rule in load_rules():
        needs = next((text for kinds, text in NEEDS.items() if set(kinds) & set(rule.needs)), "the model")
        rows.append(f"| [{rule.code}]({path(rule)}) | {rule.title} | {needs} |")
    return "\n".join(rows)


def path(rule: type[Rule]) -> str:
    """Return the path of a rule's page, in the folder of the doctor's pages."""
    return f"{rule.code.lower()}.md"


def on_config(config: Any) -> None:
    """Put the rules into the navigation, after the first page of the section `Doctor`."""
    (section,) = sections(config.nav, "Doctor")
    section[1:1] = [f"doctor/{path(rule)}" for rule in load_rules()]


def sections(nav: list[Any], title: str) -> Iterator[list[Any]]:
    """Yield the sections of the navigation that have a title, at any depth."""
    for entry in nav:
        for name, content in entry.items() if isinstance(entry, dict) else ():
            if isinstance(content, list):
                yield from [content] if name == title else sections(content, title)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the rules."""
    for rule in load_rules():
        files.append(File.generated(config, f"doctor/{path(rule)}", content=page(rule)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table where a page has `<!-- rules -->`."""
    return markdown.replace("<!-- rules -->", table())
