"""The text of Perl's documentation, Pod."""

from __future__ import annotations

import re

_WITHOUT_TEXT = frozenset("cut pod encoding over back begin end for".split())
_NESTED = 3  # levels of formatting that are undone
_NAMED = {"E<lt>": "<", "E<gt>": ">", "E<sol>": "/", "E<verbar>": "|"}


def pod_text(text: str) -> str:
    """Paragraphs without formatting codes, list items with a dash."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        command = re.match(r"=(\w+)\s*(.*)", paragraph, re.DOTALL)
        if command and command[1] in _WITHOUT_TEXT:
            continue
        if command:
            paragraph = ("- " if command[1] == "item" else "") + command[2]
        paragraph = _plain(paragraph).rstrip()
        if paragraph.strip():
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _plain(text: str) -> str:
    for _ in range(_NESTED):
        text = re.sub(r"[BCIFLSXZE]<{2,}\s(.*?)\s>{2,}", r"\1", text, flags=re.DOTALL)
        text = re.sub(r"[BCIFS]<([^<>]*)>", r"\1", text)
    text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda link: link[1] or link[2], text)
    for name, character in _NAMED.items():
        text = text.replace(name, character)
    return re.sub(r"[XZ]<[^<>]*>", "", text)
