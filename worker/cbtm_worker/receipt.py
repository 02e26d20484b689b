"""The volunteer's own receipt: what the coordinator says, signed, that this machine's account has trained."""

from __future__ import annotations

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import InvalidState
from cbtm_common.rpc import connect
from cbtm_worker.config import WorkerConfig
from cbtm_worker.identity import any_identity
from cbtm_worker.session import Session

_CONNECT_SECONDS = 10.0


def fetch_receipt(config: WorkerConfig) -> str:
    """As any worker of this machine, also while it works. Raises InvalidState when none joined from here."""
    identity = any_identity(config.cache_dir, config.coordinator)
    if identity is None:
        raise InvalidState(
            f"no worker of {config.cache_dir} has joined {config.coordinator}; pass the --coordinator and --cache-dir "
            "that it joined with"
        )
    with connect(config.coordinator, fingerprint=identity.fingerprint, attempts=3) as connection:
        Session(connection).use(identity)
        return connection.worker.GetReceipt(ws.GetReceiptRequest(), timeout=_CONNECT_SECONDS).receipt
