"""From configuration to an object store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.storage.base import ObjectStore, utc_now
from cbtm_coordinator.storage.local import LocalStore
from cbtm_coordinator.storage.s3 import S3Config, S3Store
from cbtm_coordinator.storage.signing import UrlSigner


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """`location` is `local:<folder>` or `s3://<bucket>[/<prefix>]`; the rest is for one or the other."""

    location: str
    # local: the key of the signatures, at least 16 bytes (see `load_or_create_key`).
    signing_key: bytes = b""
    # local: put before path-only URLs; empty leaves them path-only.
    public_url: str = ""
    # s3: see `S3Config`.
    endpoint_url: str = ""
    public_endpoint_url: str = ""
    region: str = "us-east-1"
    path_style: bool = True


def open_object_store(config: StorageConfig, *, clock: Callable[[], datetime] = utc_now) -> ObjectStore:
    """Opens the store; the local folder is made if it is not there. `check()` on the result proves that it works."""
    scheme, _, rest = config.location.partition(":")
    if scheme == "local" and rest:
        signer = UrlSigner(config.signing_key, public_url=config.public_url, clock=clock)
        return LocalStore(Path(rest), signer)
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    if scheme == "s3" and rest.startswith("//") and bucket:
        s3 = S3Config(
            bucket=bucket,
            prefix=prefix.strip("/"),
            endpoint_url=config.endpoint_url,
            public_endpoint_url=config.public_endpoint_url,
            region=config.region,
            path_style=config.path_style,
        )
        return S3Store(s3, clock=clock)
    raise InvalidArgument(
        f"object_store: {config.location!r} is neither local:<folder> nor s3://<bucket>/<prefix>", field="object_store"
    )
