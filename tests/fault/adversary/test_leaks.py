"""Where a secret could be seen by those whom it is kept from: `ps`, the registry, the log, an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_common.errors import PermissionDenied, Unauthenticated
from cbtm_common.rpc import Credential
from cbtm_common.security import split_token
from tests.support.coordinator import RunningCoordinator
from tests.support.raw_run import RawWorker

pytestmark = pytest.mark.integration


def test_ps_does_not_show_a_token(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    token = coordinator.token("join")
    program = "import sys; from cbtm_worker.cli import main; main()"
    join = ["join", "--coordinator", coordinator.target, "--device", "cpu", "--cache-dir", str(tmp_path)]
    for shown in (["--token", token], [f"--token={token}"]):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *join, *shown], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert "joined" in said
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
            assert "--coordinator" in line
            assert split_token(token)[0] not in line
        finally:
            process.kill()
            process.communicate()


def test_a_token_may_come_from_a_file_or_standard_input(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(coordinator.token("admin") + "\n")
    listed = coordinator.coord(
        "token", "list", "--coordinator", coordinator.target, "--token-file", str(path), "--json"
    )
    assert listed.returncode == 0, listed.stderr
    path.write_text("two words")
    refused = coordinator.coord("token", "list", "--token-file", str(path))
    assert refused.returncode == 2
    assert "words" not in refused.stderr


def test_no_secret_lies_in_the_registry_or_the_log(coordinator: RunningCoordinator, worker: RawWorker) -> None:
    bearer = worker.bearer
    # Every secret has been shown to it, and one in the wrong place.
    worker.acquire()
    with coordinator.connect(coordinator.token("admin")) as connection:
        connection.admin.ListTokens(ad.ListTokensRequest())
    with coordinator.connect() as connection:
        connection.credential = bearer
        with pytest.raises((Unauthenticated, PermissionDenied)):
            connection.admin.ListWorkers(ad.ListWorkersRequest())
    stored = b"".join(path.read_bytes() for path in coordinator.data_dir.glob("registry.db*"))
    secrets = [split_token(coordinator.token(name))[0] for name in ("admin", "join")]
    for secret in (*secrets, bearer, worker.key.hex()):
        assert secret.encode() not in stored
        assert secret not in coordinator.log
    assert isinstance(worker.connection.credential, Credential)
