"""Source text, of any language."""

from __future__ import annotations

import re

_COMMENTS = ("#!", "# ", "//", ";", "--")
_LONGEST_HEADER = 120  # lines


def without_licence(text: str) -> str:
    """Without the comment at its start when that is about the licence: the same words in every file would be what
    tells a domain best.
    """
    lines = text.split("\n")
    end = _end_of_header(lines)
    about_licence = re.search(r"copyright|licen[cs]e", "\n".join(lines[:end]), re.IGNORECASE)
    if about_licence and end < min(len(lines), _LONGEST_HEADER):
        return "\n".join(lines[end:])
    return text


def _end_of_header(lines: list[str]) -> int:
    """The number of lines before the first that is neither empty nor a comment."""
    in_comment = False
    for index, line in enumerate(lines):
        line = line.strip()
        if in_comment:
            in_comment = "*/" not in line
        elif line.startswith("/*"):
            in_comment = "*/" not in line[2:]
        elif line and line != "#" and not line.startswith(_COMMENTS):
            return index
    return len(lines)
