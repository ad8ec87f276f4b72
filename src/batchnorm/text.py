"""Make strings of the user, such as names of layers, safe to print."""

from __future__ import annotations

import unicodedata

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
