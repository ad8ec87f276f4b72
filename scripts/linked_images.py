"""A hook of mkdocs that links each chart to its file, because small text is unreadable in the width of a phone."""

from __future__ import annotations

import re
from typing import Any

_CHART = re.compile(r'<img [^>]*src="([^"]+\.png)"[^>]*>')


def on_page_content(html: str, **_: Any) -> str:
    """Put each chart of the page into a link to itself."""
    return _CHART.sub(r'<a href="\1">\g<0></a>', html)
