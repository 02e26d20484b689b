"""The certificates that a coordinator serves with: its own authority's, made by `init`, or those it was given.

    data/tls/ca.pem        the authority; its SHA-256 is the fingerprint in tokens
    data/tls/ca.key        its key, for its owner alone; signs certificates of this coordinator and nothing else
    data/tls/server.pem    key and chain that are served, replaced under the same authority when their time runs out

Processes that share a data folder share all of it. Given files are read again when they change, so that whatever renews
them needs to tell nobody.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock

from cbtm_common.errors import InvalidArgument
from cbtm_common.security import SERVER_NAME, fingerprint_of
from cbtm_coordinator.config import CoordinatorConfig
from cbtm_coordinator.private_files import write_private
from cbtm_coordinator.storage.base import utc_now

_log = logging.getLogger(__name__)

_AUTHORITY_LIFE = timedelta(days=3650)
_SERVER_LIFE = timedelta(days=90)
# Renewed when less is left.
_RENEW_BEFORE = timedelta(days=30)
# Clocks of volunteers are behind, too.
_BACKDATED = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Served:
    """Key and chain in PEM."""

    key: bytes
    chain: bytes
    not_after: datetime


class Certificates:
    """What is served now; thread-safe. Renewed when somebody asks for it and its time has come."""

    def __init__(self, config: CoordinatorConfig, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._client_ca = config.tls_client_ca_file
        self._given = config.tls_cert_file, config.tls_key_file
        self._authority = None if config.tls_cert_file else Authority(config, clock=clock)
        self._stamp = self._stamps()
        self._served = self._load()

    @property
    def fingerprint(self) -> str:
        """For tokens; empty with given certificates, which are checked by name."""
        return self._authority.fingerprint if self._authority else ""

    def current(self) -> Served:
        with self._lock:
            due = self._authority is not None and self._clock() >= self._served.not_after - _RENEW_BEFORE
            stamp = self._stamps()
            if due or stamp != self._stamp:
                try:
                    self._served = self._load()
                    self._stamp = stamp
                except InvalidArgument as error:
                    # Whatever replaces them is not done yet: certificate and key do not change in one instant.
                    _log.warning("the former certificate stays: %s", error.message)
            return self._served

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Each handshake is with what is current."""
        roots = None if self._client_ca is None else _read(self._client_ca, "tls_client_ca_file")

        def configuration() -> grpc.ServerCertificateConfiguration:
            served = self.current()
            return grpc.ssl_server_certificate_configuration([(served.key, served.chain)], roots)

        return grpc.dynamic_ssl_server_credentials(
            configuration(), configuration, require_client_authentication=roots is not None
        )

    def http_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        loaded = self.current()
        self._load_into(context)

        def on_hello(_: ssl.SSLObject, __: str | None, context: ssl.SSLContext) -> None:
            nonlocal loaded
            current = self.current()
            if current is not loaded:
                self._load_into(context)
                loaded = current

        context.sni_callback = on_hello
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        certificate, key = self._given
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        elif self._authority is not None:
            context.load_cert_chain(self._authority.server_path)

    def _load(self) -> Served:
        if self._authority is not None:
            return self._authority.server_certificate()
        certificate, key = self._given
        if certificate is None or key is None:
            raise InvalidArgument("tls_cert_file: it and tls_key_file go together", field="tls_cert_file")
        served = _served(_read(key, "tls_key_file"), _read(certificate, "tls_cert_file"), str(certificate))
        try:
            self._load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        except ssl.SSLError as error:
            raise InvalidArgument(
                f"tls_key_file: {key} is not the key of {certificate} ({error.reason})", field="tls_key_file"
            ) from error
        return served

    def _stamps(self) -> list[int]:
        return [path.stat().st_mtime_ns for path in self._given if path is not None and path.exists()]


class Authority:
    """A coordinator's own certificate authority, made where there is none."""

    def __init__(self, config: CoordinatorConfig, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._folder = config.data_dir / "tls"
        self._hosts = [config.advertise_host, config.host]
        self._clock = clock
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with self._alone():
            if not self.path.exists():
                self._create()
            self._certificate = x509.load_pem_x509_certificate(self.path.read_bytes())
        self.fingerprint = fingerprint_of(self._certificate.public_bytes(serialization.Encoding.DER))

    @property
    def path(self) -> Path:
        return self._folder / "ca.pem"

    @property
    def server_path(self) -> Path:
        return self._folder / "server.pem"

    def server_certificate(self) -> Served:
        """The one on disk, or a new one when there is none that still holds long enough."""
        with self._alone():
            if self.server_path.exists():
                text = self.server_path.read_bytes()
                served = _served(text, text, str(self.server_path))
                if self._clock() < served.not_after - _RENEW_BEFORE:
                    return served
            text = self._issue()
            write_private(self.server_path, text.decode("ascii"))
            return _served(text, text, str(self.server_path))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self._folder / "lock"):
            yield

    def _create(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cbtm coordinator authority")])
        now = self._clock()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + _AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        # The certificate last: where it is, the key is, too.
        write_private(self._folder / "ca.key", _key_pem(key).decode("ascii"))
        write_private(self.path, certificate.public_bytes(serialization.Encoding.PEM).decode("ascii"))

    def _issue(self) -> bytes:
        """A new key and its chain."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority_key = serialization.load_pem_private_key((self._folder / "ca.key").read_bytes(), password=None)
        assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
        now = self._clock()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(min(now + _SERVER_LIFE, self._certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName(list(_names(self._hosts))), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
            .sign(authority_key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        return _key_pem(key) + certificate.public_bytes(pem) + self._certificate.public_bytes(pem)


def _served(key: bytes, chain: bytes, where: str) -> Served:
    try:
        first, *_ = x509.load_pem_x509_certificates(chain)
    except ValueError as error:
        raise InvalidArgument(f"tls_cert_file: {where} holds no certificate in PEM", field="tls_cert_file") from error
    return Served(key=key, chain=chain, not_after=first.not_valid_after_utc)


def _names(hosts: list[str]) -> Iterator[x509.GeneralName]:
    """The fixed name, and those under which programs that check names may come."""
    yield x509.DNSName(SERVER_NAME)
    for host in dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), *hosts]):
        try:
            yield x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            if host and host.isascii():
                yield x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{field}: {path} cannot be read ({error.strerror})", field=field) from error
