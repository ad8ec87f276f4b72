"""Make strings of the user, such as names of layers, safe to print, and values ready for JSON."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

# Control and format characters, surrogates, and separators of lines and paragraphs.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return the text with escapes, such as `\x1b`, for control characters, which a terminal would execute.

    Args:
        text: Any string.
        lines: Whether line breaks stay, because the text has several lines.

    Examples:
        >>> printable("layer\x1b[31m\n1")
        'layer\\x1b[31m\\n1'
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if (lines and character == "\n") or unicodedata.category(character) not in _ESCAPED
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def json_values(value: Any) -> Any:
    """Return nested mappings, sequences and data classes as dicts and lists, with None for numbers that are not finite.

    Examples:
        >>> json_values({"layers": (1.5, float("nan"))})
        {'layers': [1.5, None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_values(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
