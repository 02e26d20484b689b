"""A coordinator with certificates that its owner brought, which lets in only clients with one of theirs."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator

import httpx
import pytest

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_common.errors import IntegrityError, PermissionDenied
from cbtm_common.rpc import connect
from cbtm_common.security import Security
from tests.support.certificates import OwnAuthority
from tests.support.run_fixture import Site, prepare, site, undisturbed

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnAuthority:
    return OwnAuthority(tmp_path_factory.mktemp("certificates"), "own")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> OwnAuthority:
    return OwnAuthority(tmp_path_factory.mktemp("certificates"), "stranger")


def _of(trusted: OwnAuthority, mine: OwnAuthority | None = None, name: str = "lab") -> Security:
    cert_file, key_file = (None, None) if mine is None else mine.client(name)
    return Security(ca_file=trusted.ca_file, cert_file=cert_file, key_file=key_file)


def _environment(security: Security) -> dict[str, str]:
    files = {"CA": security.ca_file, "CERT": security.cert_file, "KEY": security.key_file}
    return {f"CBTM_{name}_FILE": str(path) for name, path in files.items() if path is not None}


@pytest.fixture(scope="module")
def here(own: OwnAuthority) -> Iterator[Site]:
    """A coordinator that runs, and how to be let in in the environment: of this process, and of those it starts."""
    prepare()
    certificate, key = own.server()
    client = _environment(_of(own, own, "owner"))
    with pytest.MonkeyPatch.context() as environment, site("certificates") as made:
        for name, value in client.items():
            environment.setenv(name, value)
        made.environment = {
            "CBTM_TLS_CERT_FILE": str(certificate),
            "CBTM_TLS_KEY_FILE": str(key),
            "CBTM_TLS_CLIENT_CA_FILE": str(own.ca_file),
            **client,
        }
        made.start_coordinator()
        yield made


def test_a_worker_with_a_certificate_joins_and_trains_all_there_is(here: Site) -> None:
    # What is checked by name needs no fingerprint.
    assert "." not in here.join_token
    assert "." not in here.admin_token
    worker = here.start_worker("lab")
    assert worker.wait(120) == 0, worker.output
    assert here.is_complete(), here.logs()
    assert here.experts() == undisturbed()


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_who_shows_no_certificate_of_theirs_is_not_let_in(
    here: Site, own: OwnAuthority, stranger: OwnAuthority, who: str
) -> None:
    security = _of(own, stranger if who == "stranger" else None)
    with (
        connect(here.target, token=here.admin_token, security=security) as connection,
        pytest.raises(PermissionDenied, match="lets in only clients with a certificate that it trusts"),
    ):
        connection.catalog.ListRuns(cs.ListRunsRequest())
    # Nor to the objects.
    context = ssl.create_default_context(cafile=own.ca_file)
    if security.cert_file is not None and security.key_file is not None:
        context.load_cert_chain(security.cert_file, security.key_file)
    with httpx.Client(verify=context) as client, pytest.raises(httpx.TransportError):
        client.get(f"https://127.0.0.1:{here.http_port}/healthz")


def test_who_is_let_in_reads_objects_by_the_same_certificate(here: Site, own: OwnAuthority) -> None:
    with connect(here.target, token=here.admin_token, security=_of(own, own)) as connection:
        connection.catalog.ListRuns(cs.ListRunsRequest())
        with httpx.Client(verify=connection.http_context()) as client:
            assert client.get(f"https://127.0.0.1:{here.http_port}/healthz").status_code == 200


def test_a_coordinator_of_another_authority_is_told_nothing(
    here: Site, own: OwnAuthority, stranger: OwnAuthority
) -> None:
    with (
        connect(here.target, token=here.admin_token, security=_of(stranger, own)) as connection,
        pytest.raises(IntegrityError, match="not trusted here"),
    ):
        connection.catalog.ListRuns(cs.ListRunsRequest())


@pytest.mark.parametrize("missing", ["authority", "certificate"])
def test_a_worker_that_lacks_a_file_is_told_which(
    here: Site, own: OwnAuthority, stranger: OwnAuthority, missing: str
) -> None:
    security = _of(stranger, own) if missing == "authority" else _of(own)
    before = here.environment
    here.environment = _environment(security)
    try:
        worker = here.start_worker(f"without-{missing}")
    finally:
        here.environment = before
    # At once: each try again would wait, for seconds in all.
    assert worker.wait(60) == 1, worker.output
    told = "is not trusted here; .*--ca-file" if missing == "authority" else "it trusts: pass --cert-file"
    assert re.search(f"cbtm-worker: error: coordinator: {here.target} .*{told}", worker.output), worker.output
    assert "Traceback" not in worker.output
