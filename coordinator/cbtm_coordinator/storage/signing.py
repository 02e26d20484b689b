"""Signed, path-only URLs of the local backend: HMAC-SHA-256 over everything that the URL permits.

A URL is `/v1/objects/<key>?expires=…&…&signature=…`. The signature binds the method, the key, the expiry and, for
writing, the length and the SHA-256, or the length, the upload and the part's number. A parameter that is not signed is
refused, so nothing can be added; GET's signature also allows HEAD. Time is the coordinator's own clock on both sides.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from cbtm_common.errors import InvalidArgument, PermissionDenied, Unauthenticated
from cbtm_coordinator.storage.base import Signed, check_key, utc_now

OBJECTS_PATH = "/v1/objects/"
_MIN_KEY_BYTES = 16
_PARAMETERS = frozenset({"expires", "size", "sha256", "upload", "part"})
# No separator of the signed text can be smuggled in by a value.
_VALUE = re.compile(r"[0-9A-Za-z_]{1,80}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What a signature permits. `size` in bytes; `upload_id` is empty unless a part may be written."""

    method: str
    key: str
    size: int = 0
    sha256: str = ""
    upload_id: str = ""
    part: int = 0


class UrlSigner:
    """Signs URLs and checks them. `public_url` is put before the path when set."""

    def __init__(self, key: bytes, *, public_url: str = "", clock: Callable[[], datetime] = utc_now) -> None:
        if len(key) < _MIN_KEY_BYTES:
            raise InvalidArgument(
                f"signing_key: {len(key)} bytes are too few; at least {_MIN_KEY_BYTES}", field="signing_key"
            )
        self._key = key
        self._public_url = public_url.rstrip("/")
        self._clock = clock

    def sign(self, grant: Grant, *, ttl: timedelta) -> Signed:
        check_key(grant.key)
        expires = math.ceil((self._clock() + ttl).timestamp())
        parameters = {"expires": str(expires)}
        if grant.method == "PUT":
            parameters["size"] = str(grant.size)
            if grant.upload_id:
                parameters |= {"upload": grant.upload_id, "part": str(grant.part)}
            else:
                parameters["sha256"] = grant.sha256
        signature = self._signature(grant.method, grant.key, parameters)
        return Signed(
            method=grant.method,
            url=f"{self._public_url}{object_path(grant.key)}?{urlencode({**parameters, 'signature': signature})}",
            expires=datetime.fromtimestamp(expires, UTC),
            headers={"content-length": str(grant.size)} if grant.method == "PUT" else {},
        )

    def check(self, method: str, raw_path: str, raw_query: str) -> Grant:
        """What the request may do. `raw_path` and `raw_query` are as they came, undecoded.

        Raises InvalidArgument (not a key, or not in its one spelling), Unauthenticated (no signature) or
        PermissionDenied (wrong, or expired).
        """
        key = check_key(unquote(raw_path.removeprefix(OBJECTS_PATH)))
        if raw_path != object_path(key):
            raise InvalidArgument("key: the path is not in its one spelling", field="key")
        pairs = parse_qsl(raw_query, keep_blank_values=True)
        parameters = dict(pairs)
        signature = parameters.pop("signature", "")
        if not signature:
            raise Unauthenticated("the URL carries no signature")
        well_formed = (
            len(pairs) == len(parameters) + 1
            and parameters.keys() <= _PARAMETERS
            and all(_VALUE.fullmatch(value) for value in parameters.values())
        )
        signed_method = "GET" if method == "HEAD" else method
        expected = self._signature(signed_method, key, parameters)
        if not hmac.compare_digest(signature.encode(), expected.encode()) or not well_formed:
            raise PermissionDenied("the signature does not fit this request")
        # From here on the parameters are our own.
        if self._clock().timestamp() >= int(parameters["expires"]):
            raise PermissionDenied("the URL has expired; ask the coordinator for a new one")
        return Grant(
            method=signed_method,
            key=key,
            size=int(parameters.get("size", 0)),
            sha256=parameters.get("sha256", ""),
            upload_id=parameters.get("upload", ""),
            part=int(parameters.get("part", 0)),
        )

    def _signature(self, method: str, key: str, parameters: Mapping[str, str]) -> str:
        lines = ["cbtm-url-1", method, key, *(f"{name}={parameters[name]}" for name in sorted(parameters))]
        return hmac.new(self._key, "\n".join(lines).encode(), hashlib.sha256).hexdigest()


def object_path(key: str) -> str:
    """The one spelling of a key's path in a URL."""
    return OBJECTS_PATH + quote(key, safe="/")


def load_or_create_key(path: Path) -> bytes:
    """The signing key in `path`, made (32 random bytes in hexadecimal, for its owner alone) if it is not there yet.

    Every coordinator process of one local store must use the same file; whoever comes first makes it.
    """
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another process was first: its key counts
        finally:
            temporary.unlink()
    try:
        return bytes.fromhex(path.read_text().strip())
    except ValueError as error:
        raise InvalidArgument(
            f"signing_key: {path} is not hexadecimal; delete it to have a new one made", field="signing_key"
        ) from error
