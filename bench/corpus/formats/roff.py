"""The text of a manual page: roff with the man macros, and the commonest of mdoc."""

from __future__ import annotations

import re

# In this order: what one leaves may be another's.
_ESCAPES = {
    r"\(bu": "*", r"\(em": "--", r"\(en": "-", r"\(aq": "'", r"\(dq": '"', r"\(co": "(c)", r"\(lq": '"', r"\(rq": '"',
    r"\(cq": "'", r"\(oq": "'", r"\(ha": "^", r"\(ti": "~", r"\(rs": "\\", r"\-": "-", r"\e": "\\", r"\&": "",
    r"\|": "", r"\^": "", r"\/": "", r"\,": "", r"\%": "", r"\:": "", r"\ ": " ", r"\~": " ", r"\0": " ", r"\'": "'",
    r"\`": "`",
}  # fmt: skip
_CHARACTERS = {
    "aq": "'", "dq": '"', "em": "--", "en": "-", "bu": "*", "lq": '"', "rq": '"', "ti": "~", "ha": "^", "rs": "\\",
}  # fmt: skip
_WITHOUT_TEXT = tuple(
    re.compile(pattern)
    for pattern in (
        r'\\"(?!\().*$',  # comments
        r"\\f(?:\[[^\]]*\]|\([A-Z]{2}|.)",  # fonts
        r"\\s[-+]?\d{1,2}|\\s\([-+]?\d\d",  # sizes
        r"\\\*\(..|\\\*\[[^\]]*\]|\\\*.",  # strings
        r"\\[hvwdux]'[^']*'",  # motions
        r"\\[nk](?:\(..|\[[^\]]*\]|.)",  # registers
        r"\\m\[[^\]]*\]",  # colours
    )
)
_HEADINGS = frozenset("SH SS Sh Ss".split())
_SPACED = frozenset("B I SM SB Nm Fl Ar Op Xr Pa Li Dv Nd It Fn Ft Cm Em Sy Va Er Ql Dq".split())
_JOINED = frozenset("BR RB BI IB IR RI".split())
_PARAGRAPHS = frozenset("PP P LP sp Pp TP TQ HP".split())
_TABLE_LAYOUT = re.compile(r"^[lcrnaLCRNAbBiIwx0-9().,; _^|-]*[.;]$")


def roff_text(text: str) -> str:
    """Filled lines joined to paragraphs. Nothing for a page that only names another one."""
    if len(text) < 400 and re.search(r"^\.so ", text[:200], re.MULTILINE):
        return ""
    page = _Page()
    for line in text.splitlines():
        page.read(line)
    return page.text()


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._paragraph: list[str] = []
        self._filling = True
        self._in_table = False

    def text(self) -> str:
        self._end_paragraph()
        return re.sub(r"\n{2,}", "\n\n", "\n".join(self._lines))

    def read(self, line: str) -> None:
        if line in (".", "'") or line.startswith(("'\\\"", '.\\"', "'''")):
            return
        if line.startswith((".", "'")):
            self._read_request(line)
        elif not (self._in_table and _TABLE_LAYOUT.match(line)):
            if self._in_table:
                line = line.replace("T{", "").replace("T}", "")
            text = _inline(line)
            if self._filling:
                self._fill(text)
            else:
                self._line(text)

    def _read_request(self, line: str) -> None:
        request = re.match(r"[.']\s*([A-Za-z][A-Za-z0-9]*|\\\")?\s*(.*)", line)
        assert request is not None
        name, rest = request[1], _inline(request[2])
        if name in _HEADINGS:
            self._line(" ".join(_arguments(rest)))
        elif name in _SPACED:
            self._fill(" ".join(_arguments(rest)))
        elif name in _JOINED:
            self._fill("".join(_arguments(rest)))
        elif name in _PARAGRAPHS:
            self._fill("")
        elif name == "IP":
            self._line(" ".join(_arguments(rest)[:1]))
        elif name in ("nf", "EX", "fi", "EE"):
            self._filling = name in ("fi", "EE")
            self._fill("")
        elif name in ("TS", "TE"):
            self._in_table = name == "TS"
        elif name in ("UR", "MT"):
            self._fill(f"<{rest}>")

    def _fill(self, text: str) -> None:
        """To the paragraph; empty text ends it."""
        if text:
            self._paragraph.append(text.strip())
        else:
            self._line("")

    def _line(self, text: str) -> None:
        self._end_paragraph()
        self._lines.append(text)

    def _end_paragraph(self) -> None:
        if self._paragraph:
            self._lines.append(" ".join(self._paragraph))
            self._paragraph = []


def _inline(text: str) -> str:
    for pattern in _WITHOUT_TEXT:
        text = pattern.sub("", text)
    for escape, character in _ESCAPES.items():
        text = text.replace(escape, character)
    return re.sub(r"\\\[([^\]]+)\]", _character, text).replace("\\c", "").rstrip()


def _character(named: re.Match[str]) -> str:
    """What `\\[name]` and `\\[uXXXX]` stand for."""
    name = named[1]
    if name in _CHARACTERS:
        return _CHARACTERS[name]
    return chr(int(name[1:], 16)) if re.fullmatch(r"u[0-9A-F]{4,5}", name) else ""


def _arguments(text: str) -> list[str]:
    return [quoted or plain for quoted, plain in re.findall(r'"((?:[^"]|"")*)"|(\S+)', text)]
