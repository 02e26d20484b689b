"""`python -m cbtm_coordinator.migrations check | upgrade --url URL | revision -m MESSAGE`: for developers and CI."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from alembic import command

from cbtm_coordinator import migrations
from cbtm_coordinator.store.database import open_engine


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cbtm_coordinator.migrations", description=__doc__)
    parser.add_argument("what", choices=["check", "upgrade", "revision"])
    parser.add_argument("-m", "--message", default="")
    parser.add_argument("--url", default="", help="database to upgrade: sqlite:///PATH or postgresql://…")
    options = parser.parse_args()
    if options.what == "upgrade":
        if not options.url:
            parser.error("upgrade needs --url")
        engine = open_engine(options.url)
        migrations.upgrade(engine)
        engine.dispose()
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        engine = open_engine(f"sqlite:///{Path(scratch) / 'registry.db'}")
        migrations.upgrade(engine)
        if options.what == "revision":
            with engine.begin() as connection:
                command.revision(migrations.config(connection), message=options.message, autogenerate=True)
            return 0
        found = migrations.differences(engine)
        engine.dispose()
    for difference in found:
        sys.stderr.write(f"migrations and tables differ: {difference}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
