"""A hook of mkdocs that makes the page of each rule of the doctor, their table and their navigation from the rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from batchnorm.rule_texts import RuleText, rule_texts

# The arguments that a need requires of the user, from the most to the least demanding.
NEEDS = {
    ("data", "output", "pass", "step"): "data",
    ("optimizer",): "the optimizer",
    ("ranks",): "the processes",
}


def table() -> str:
    """Return the Markdown table of all rules."""
    rows = ["| code | finding | needs |", "|---|---|---|"]
    for rule in rule_texts().values():
        needs = next((text for kinds, text in NEEDS.items() if set(kinds) & set(rule.needs)), "the model")
        rows.append(f"| [{rule.code}]({path(rule)}) | {rule.title} | {needs} |")
    return "\n".join(rows)


def path(rule: RuleText) -> str:
    """Return the path of a rule's page, in the folder of the doctor's pages."""
    return f"{rule.code.lower()}.md"


def on_config(config: Any) -> None:
    """Put the rules into the navigation, after the first page of the section `Doctor`."""
    (section,) = sections(config.nav, "Doctor")
    section[1:1] = [f"doctor/{path(rule)}" for rule in rule_texts().values()]


def sections(nav: list[Any], title: str) -> Iterator[list[Any]]:
    """Yield the sections of the navigation that have a title, at any depth."""
    for entry in nav:
        for name, content in entry.items() if isinstance(entry, dict) else ():
            if isinstance(content, list):
                yield from [content] if name == title else sections(content, title)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the rules."""
    for rule in rule_texts().values():
        files.append(File.generated(config, f"doctor/{path(rule)}", content=rule.markdown()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table where a page has `<!-- rules -->`."""
    return markdown.replace("<!-- rules -->", table())
