"""How a client knows the coordinator that it talks to, and what it shows of itself: TLS by default.

A token may carry, after a dot, the fingerprint of the coordinator's own certificate authority: the SHA-256 of its
certificate, in base64url. Whoever has such a token needs no certificate file: the authority's certificate is read off
the first handshake, trusted only if its digest is that one, and is then the only root for this coordinator. The host's
name is not compared, for that authority signs nothing but its one coordinator, under whatever name it is reached.

Without a fingerprint, certificates are checked as in a browser, by the system's authorities or those in `ca_file`.
`insecure` is for loopback, or has to be said twice.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import os
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from cbtm_common.errors import IntegrityError, InvalidArgument, Unavailable

# What a coordinator's own authority certifies. ".internal" is nobody's on the internet.
SERVER_NAME = "coordinator.cbtm.internal"
_FINGERPRINT_BYTES = 32
_CONNECT_SECONDS = 10.0


def fingerprint_of(certificate: bytes) -> str:
    """Of a certificate in DER: 43 characters."""
    return base64.urlsafe_b64encode(hashlib.sha256(certificate).digest()).decode().rstrip("=")


def join_token(secret: str, fingerprint: str) -> str:
    return f"{secret}.{fingerprint}" if fingerprint else secret


def split_token(token: str) -> tuple[str, str]:
    """(secret, fingerprint); an empty fingerprint when it carries none. Raises InvalidArgument, without telling it."""
    secret, dot, fingerprint = token.strip().partition(".")
    if dot:
        try:
            complete = len(base64.b64decode(fingerprint + "=", altchars=b"-_", validate=True)) == _FINGERPRINT_BYTES
        except (binascii.Error, ValueError):
            complete = False
        if not complete:
            raise InvalidArgument("token: what follows its dot is no fingerprint; was it cut short?", field="token")
    return secret, fingerprint


def is_loopback(host: str) -> bool:
    name = host.strip("[]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def check_insecure(host: str, insecure: int) -> None:
    """Raises InvalidArgument when plain text was asked for once, and `host` is not this machine."""
    if insecure == 1 and not is_loopback(host):
        raise InvalidArgument(
            f"insecure: {host} is not this machine; tokens and data would pass in plain text. Leave --insecure away, "
            "or say it twice if you mean it",
            field="insecure",
        )


@dataclass(frozen=True, kw_only=True)
class Security:
    """What a person chose. `cert_file` and `key_file` are for coordinators that ask for a client's certificate."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    # How often plain text was asked for.
    insecure: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """CBTM_CA_FILE, CBTM_CERT_FILE, CBTM_KEY_FILE, and CBTM_INSECURE (1, or 2 for said twice)."""

        def path(name: str) -> Path | None:
            return Path(environment[name]) if environment.get(name) else None

        insecure = environment.get("CBTM_INSECURE", "") or "0"
        if insecure not in ("0", "1", "2"):
            raise InvalidArgument("CBTM_INSECURE: is not 0, 1 or 2", field="insecure")
        return cls(
            ca_file=path("CBTM_CA_FILE"),
            cert_file=path("CBTM_CERT_FILE"),
            key_file=path("CBTM_KEY_FILE"),
            insecure=int(insecure),
        )

    def trust(self, host: str, port: int, fingerprint: str) -> Trust:
        """What to trust at `host`. With a fingerprint, asks there for the authority's certificate.

        Raises InvalidArgument for files that cannot be read and for a port that does not speak TLS, IntegrityError
        when another authority answers, and Unavailable when nobody does.
        """
        check_insecure(host, self.insecure)
        if self.insecure:
            return Trust(plain=True)
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidArgument("cert_file: it and key_file go together", field="cert_file")
        chain = None if self.cert_file is None else _read(self.cert_file, "cert_file")
        key = None if self.key_file is None else _read(self.key_file, "key_file")
        if self.ca_file is None and fingerprint:
            return Trust(roots=_fetch_authority(host, port, fingerprint), pinned=True, chain=chain, key=key, files=self)
        roots = None if self.ca_file is None else _read(self.ca_file, "ca_file")
        return Trust(roots=roots, chain=chain, key=key, files=self)


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Roots in PEM (None: the system's), and our own certificate and key, if any."""

    plain: bool = False
    roots: bytes | None = None
    # The roots are of one coordinator alone, whatever name it goes by.
    pinned: bool = False
    chain: bytes | None = None
    key: bytes | None = None
    files: Security = Security()

    def channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        if self.plain:
            return grpc.insecure_channel(target, options=list(options))
        credentials = grpc.ssl_channel_credentials(self.roots, self.key, self.chain)
        name = [("grpc.ssl_target_name_override", SERVER_NAME)] if self.pinned else []
        return grpc.secure_channel(target, credentials, options=[*options, *name])

    def http_context(self) -> ssl.SSLContext:
        """For the coordinator's own HTTP endpoint."""
        context = ssl.create_default_context(cadata=self.roots.decode("ascii") if self.roots else None)
        context.check_hostname = not self.pinned
        if self.files.cert_file and self.files.key_file:
            context.load_cert_chain(self.files.cert_file, self.files.key_file)
        return context

    def is_shut_out(self, host: str, port: int) -> bool:
        """Whether `host` ends a connection when it has seen our certificate, or that we have none.

        gRPC's servers say nothing then: the handshake comes to its end, and not a byte follows.
        """
        if self.plain:
            return False
        context = self.http_context()
        context.set_alpn_protocols(["h2"])
        name = SERVER_NAME if self.pinned else host.strip("[]")
        try:
            with (
                socket.create_connection((host.strip("[]"), port), timeout=_CONNECT_SECONDS) as link,
                context.wrap_socket(link, server_hostname=name) as wrapped,
            ):
                return not wrapped.recv(1)
        except OSError:
            return False


def not_in_tls(target: str) -> str:
    return (
        f"coordinator: {target} does not answer in TLS; is that the gRPC port, and is it served with TLS? "
        "(--insecure is for one that is not)"
    )


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{field}: {path} cannot be read ({error.strerror})", field=field) from error


def _fetch_authority(host: str, port: int, fingerprint: str) -> bytes:
    """The certificate with this fingerprint, in PEM, from those that `host` shows. Nothing secret is sent."""
    target = f"{host}:{port}"
    # The digest below is the check.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), port), timeout=_CONNECT_SECONDS) as link,
            context.wrap_socket(link, server_hostname=SERVER_NAME) as wrapped,
        ):
            shown = _shown_by(wrapped)
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            raise InvalidArgument(not_in_tls(target), metadata={"target": target}) from error
        raise Unavailable(
            f"coordinator: {target} breaks the TLS handshake off ({error.reason or error})", metadata={"target": target}
        ) from error
    except OSError as error:
        raise Unavailable(
            f"coordinator: {target} does not answer ({error.strerror or error}); is `cbtm-coord serve` running there, "
            "and its port open?",
            metadata={"target": target},
        ) from error
    for certificate in shown:
        if fingerprint_of(certificate) == fingerprint:
            return ssl.DER_cert_to_PEM_cert(certificate).encode("ascii")
    raise IntegrityError(
        f"coordinator: {target} does not show the certificate that the token names. Either somebody stands between, or "
        "the coordinator was set up anew: ask the run's owner for a new token. Nothing was sent",
        metadata={"target": target},
    )


def _shown_by(wrapped: ssl.SSLSocket) -> list[bytes]:
    """The certificates of the handshake, in DER, unchecked."""
    if sys.version_info >= (3, 13):
        return list(wrapped.get_unverified_chain())
    # There since 3.10, public since 3.13; pip's own `truststore` reads it so, too.
    inner: Any = wrapped._sslobj  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in inner.get_unverified_chain() or ()]
