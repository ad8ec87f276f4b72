"""An HTML page of the doctor as elements and charts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """The page's elements, each with its attributes and all the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.unclosed = [tag for tag, *_ in self._open]

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for *_, text in self._open:
            text.append(data)

    def all(self, tag: str, of: str = "") -> list[tuple[dict[str, str | None], str]]:
        """Return the attributes and the text of all elements of a tag, or of those with a class."""
        return [
            (attributes, " ".join("".join(text).split()))
            for name, attributes, text in self.elements
            if name == tag and (not of or of in (attributes.get("class") or "").split())
        ]


def charts_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', html, re.S).group(1))
