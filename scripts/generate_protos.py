"""Generates common/cbtm_api from protos/. `--check` writes nothing and fails when the committed code is stale."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUT = ROOT / "common"


def generate(out: Path) -> list[Path]:
    """Generates into `out` and returns the paths of what it made, relative to it."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    code = protoc.main(
        [
            "protoc",
            f"-I{PROTOS}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={out}",
            f"--mypy_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out={out}",
            *sources,
        ]
    )
    if code != 0:
        raise SystemExit(code)
    for package in ("cbtm_api", "cbtm_api/v1"):
        (out / package / "__init__.py").write_text('"""Generated from protos/. Do not edit."""\n')
        (out / package / "py.typed").touch()
    return sorted(p.relative_to(out) for p in (out / "cbtm_api").rglob("*") if p.is_file() and p.suffix != ".pyc")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(OUT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        made = generate(Path(scratch))
        stale = [str(p) for p in made if not (OUT / p).exists() or not filecmp.cmp(Path(scratch) / p, OUT / p, False)]
    if stale:
        print("Generated code is stale; run `make protos`:", *stale, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
