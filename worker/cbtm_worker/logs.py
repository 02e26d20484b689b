"""Where a worker's log lines go."""

from __future__ import annotations

import logging


def configure_logging(level: str) -> None:
    """To stderr, from `level` on."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # They log every URL, and a signed URL is a secret.
    for logger in ("httpx", "httpcore"):
        logging.getLogger(logger).setLevel(logging.WARNING)
