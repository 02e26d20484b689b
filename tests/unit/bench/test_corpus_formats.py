"""Texts out of files of every format that the corpus reads."""

from __future__ import annotations

import pytest

from bench.corpus.documents import clean
from bench.corpus.formats import FORMATS


def text_of(form: str, content: str) -> str:
    ((section, text),) = FORMATS[form](content)
    assert section == ""
    return clean(text)


def test_html_is_without_navigation_and_keeps_preformatted_text() -> None:
    page = """<html><head><title>dropped</title></head><body>
    <div class="docs navheader"><p>Prev <a href="x">Next</a></p></div>
    <h1>Using&nbsp;ls</h1><p>Lists
       files<br>by <b>name</b>.</p>
    <ul><li>one<li>two</ul>
    <pre>a  b
  c</pre><table><tr><td>x</td><td>y</td></tr></table><script>if (a<b) {}</script></body></html>"""
    assert text_of("html", page) == ("Using ls\n\nLists files\nby name.\n\n- one\n- two\n\na  b\n  c\n\n x y")


def test_html_that_is_badly_nested_ends_what_it_left_open() -> None:
    assert text_of("html", "<div class=nav><p>menu</div><p>text</section></p><p>more") == "text\n\nmore"


def test_a_manual_page() -> None:
    page = r"""'\" t
.\" Copyright of someone
.TH LS 1
.SH "LIST NAMES"
.B ls
.RI [ option ]
prints\~names \(en \fIsorted\fP.\" not this
.PP
Next\-to\-last \[u00E9]\[aq].
.nf
one
  two
.fi
.TS
l l.
a	T{
b
T}
.TE
.IP "\(bu" 2
item
.UR example
"""
    assert text_of("roff", page) == (
        "LIST NAMES\nls [option] prints names - sorted.\n\nNext-to-last é'.\n\none\n  two\n\na b\n\n*\nitem <example>"
    )


def test_a_manual_page_that_names_another_has_no_text() -> None:
    assert text_of("roff", ".so man3/printf.3\n") == ""


def test_pod() -> None:
    page = (
        "=head1 NAME\n\nC<< a > b >> and B<I<bold>>, L<the docs|perlfunc>, E<lt>x\n\n"
        "=over 4\n\n=item one\n\n  code\n\n=cut\n"
    )
    assert text_of("pod", page) == "NAME\n\na > b and bold, the docs, <x\n\n- one\n\n  code"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("/* Copyright\n   someone */\n", "int x;\n"),
        ("#!/bin/sh\n# Licensed to all\n#\n\n", "import os\n"),
        ("// licence: MIT\n", "package main\n"),
    ],
)
def test_code_is_without_the_licence_at_its_start(header: str, code: str) -> None:
    assert text_of("code", header + code) == code.strip()


@pytest.mark.parametrize("code", ["# How it works\nx = 1", "x = 1\n# Copyright someone", "# Copyright someone"])
def test_other_comments_and_files_of_comments_alone_are_kept(code: str) -> None:
    assert text_of("code", code) == code


def test_a_dictionary_is_without_what_it_says_of_itself_and_short_entries() -> None:
    about = "\n".join(f"00-database-{i}\n     about this dictionary" for i in range(5))
    long = "Word\n     n.\n\n     1. A unit of language that a space or a stop sets apart.\n"
    assert text_of("dictionary", f"{about}\n{long}\nLow\n     not high\n") == long.strip().replace("\n\n", "\n")


def test_metamath_statements_have_their_comments() -> None:
    database = (
        "$c wff $.\n$( Ponens.\n\n  Twice. $)\nax-mp $a |- ps $.\n"
        "${ x $e |- ph $. $( Id. $)\nid $p |- ph $= ( x ) A $.\n$}"
    )
    assert text_of("metamath", database) == (
        "$( Ponens.\n  Twice. $)\nax-mp $a |- ps $.\n\n$( Id. $)\nid $p |- ph $= ( x ) A $."
    )


def test_licences_of_other_languages_have_no_text() -> None:
    assert text_of("licence", "---\nkey: mit\n---\nPermission\n---\nis") == "Permission\n---\nis"
    assert text_of("licence", "---\nkey: eupl\nlanguage: de\n---\nErlaubnis") == ""
    assert text_of("licence", "Permission") == "Permission"


def test_wikitext_is_cut_into_articles_and_its_marks_undone() -> None:
    text = (
        " \n = Robert Boulter = \n \n Born 2 @,@ 000 years ago . \n \n"
        " = = Career = = \n A well @-@ known man . \n = Other = \n Text"
    )
    articles = [(section, clean(found)) for section, found in FORMATS["wikitext"](text)]
    assert articles[1:] == [
        ("1", "= Robert Boulter =\n\n Born 2,000 years ago .\n\n = = Career = =\n\n A well-known man ."),
        ("2", "= Other =\n\n Text"),
    ]


def test_codes_of_diagnoses_are_indented_below_their_own() -> None:
    xml = """<?xml version="1.0" encoding="utf-8"?>
    <ICD10CM.tabular><chapter><section id="A00-A09"><desc>Intestinal infections</desc>
    <diag><name>A00</name><desc>Cholera</desc><excludes1><note>carrier</note></excludes1>
    <diag><name>A00.0</name><desc>Classical</desc><inclusionTerm><note>El Tor</note></inclusionTerm></diag></diag>
    <diag><name>A01</name><desc>Typhoid</desc></diag></section></chapter></ICD10CM.tabular>"""
    assert list(FORMATS["icd10"](xml)) == [
        (
            "A00-A09",
            "Intestinal infections\n\nA00 Cholera\n  Excludes (never together): carrier\n  A00.0 Classical\n"
            "    Also: El Tor\n\nA01 Typhoid",
        )
    ]
