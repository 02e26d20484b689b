from __future__ import annotations

import subprocess
import sys
import time

import pytest

import cbtm

HEAVY = "torch transformers tokenizers sklearn sqlalchemy boto3 pyarrow grpc numpy"


def test_all_is_exactly_the_sorted_public_names() -> None:
    assert cbtm.__all__ == sorted(cbtm.__all__)
    assert set(cbtm.__all__) == set(cbtm._HOME)
    assert set(cbtm.__all__) <= set(dir(cbtm))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Ensembel"):
        cbtm.Ensembel  # noqa: B018


def test_names_that_need_no_tensors_come_without_torch() -> None:
    code = f"""
import sys, cbtm
assert issubclass(cbtm.NotFound, cbtm.CbtmError)
loaded = set({HEAVY!r}.split()) & set(sys.modules)
assert not loaded, loaded
import cbtm._cli
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_quick_and_names_every_command() -> None:
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-c", "from cbtm._cli import main; main()", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert time.monotonic() - started < 5  # a bound for busy machines; it takes a tenth of that
    for command in ("eval", "generate", "merge", "route", "save"):
        assert command in shown
