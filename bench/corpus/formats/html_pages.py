"""The text of an HTML page, without its navigation."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
_APART = _HEADINGS | {"p", "pre", "table", "blockquote"}  # a blank line before
_BLOCKS = _APART | set("div br li tr dt dd ul ol dl section article caption title".split())
_SKIPPED = frozenset("script style nav head header footer aside noscript svg button select form".split())
_WITHOUT_END = frozenset("br hr img input meta link col area base wbr source param embed".split())
_MAY_BE_NAVIGATION = frozenset("div ul table p span nav".split())
# Classes and ids of navigation, as the documentation's generators name it.
_NAVIGATION = re.compile(
    r"(?:^|\s)(navheader|navfooter|docnav|sphinxsidebar|related|footer|header|nav-panel|nav|navigation|top|toc|index"
    r"|breadcrumbs|menu|tocset|chlinktop|chlinkprevnexttop|chlinkprevnextbot|chlinkbot|navi|nosearch|desktoponly"
    r"|mobileonly)(?:\s|$)",
    re.IGNORECASE,
)


def html_text(text: str) -> str:
    """Blocks on lines of their own, list items with a dash, white space as it is in `pre` alone."""
    page = _Page()
    page.feed(text)
    page.close()
    return "".join(page.pieces)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._open: list[tuple[str, bool]] = []  # (tag, whether it and what is in it is skipped)
        self._skipping = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _WITHOUT_END:
            if tag in _BLOCKS and not self._skipping:
                self.pieces.append("\n")
            return
        skipped = tag in _SKIPPED or (tag in _MAY_BE_NAVIGATION and _is_navigation(dict(attrs)))
        self._open.append((tag, skipped))
        self._skipping += skipped
        if self._skipping:
            return
        self._verbatim += tag == "pre"
        if tag == "li":
            self.pieces.append("\n- ")
        elif tag in ("td", "th"):
            self.pieces.append(" ")
        elif tag in _BLOCKS:
            self.pieces.append("\n\n" if tag in _APART else "\n")

    def handle_endtag(self, tag: str) -> None:
        at = next((i for i in reversed(range(len(self._open))) if self._open[i][0] == tag), None)
        if tag in _WITHOUT_END or at is None:
            return
        for ended, skipped in self._open[at:]:
            self._skipping -= skipped
            if ended == "pre" and self._verbatim and not skipped:
                self._verbatim -= 1
        del self._open[at:]
        if tag in _BLOCKS and not self._skipping:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.pieces.append(data if self._verbatim else re.sub(r"\s+", " ", data))


def _is_navigation(attributes: dict[str, str | None]) -> bool:
    named = f"{attributes.get('class') or ''} {attributes.get('id') or ''}"
    return bool(_NAVIGATION.search(named))
