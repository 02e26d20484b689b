"""The coordinator's configuration: one frozen object, read once.

Each field comes from, in this order: a command-line flag; an environment variable (`CBTM_` and the field's name in
capitals); `coordinator.toml` in the data folder; its default.
"""

from __future__ import annotations

import os
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.limits import Quotas, Rates

CONFIG_NAME = "coordinator.toml"
SIGNING_KEY_NAME = "signing.key"
RECEIPT_KEY_NAME = "receipt.key"
ADMIN_TOKEN_NAME = "admin.token"  # noqa: S105  # the name of a file
JOIN_TOKEN_NAME = "join.token"  # noqa: S105  # the name of a file
ADDRESS_NAME = "coordinator.address"
DEFAULT_DATA_DIR = Path("cbtm-data")

_Port = Annotated[int, Field(ge=0, le=65_535)]
_Count = Annotated[int, Field(ge=0)]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CoordinatorConfig(BaseSettings):
    """Everything `cbtm-coord serve` can be told."""

    model_config = SettingsConfigDict(env_prefix="CBTM_", frozen=True, extra="forbid")

    # SQLite registry, embedded object store, keys and tokens lie here.
    data_dir: Path = DEFAULT_DATA_DIR
    # Interface to listen on, for gRPC and HTTP.
    host: Annotated[str, Field(min_length=1)] = "0.0.0.0"  # noqa: S104  # volunteers connect from anywhere
    # 0 takes a free port.
    port: _Port = 50051
    http_port: _Port = 8080
    # Host that volunteers are told to connect to; found by itself when empty.
    advertise_host: str = ""
    # Plain text: for loopback, or said twice (2).
    insecure: Annotated[int, Field(ge=0, le=2)] = 0
    # Certificate chain and key in PEM, in the place of the ones that `init` makes; read again when they change.
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    # Only clients with a certificate of these authorities may connect.
    tls_client_ca_file: Path | None = None
    # Base of the HTTP endpoint's URLs when it stands behind a proxy, such as https://data.example.org.
    public_http_url: str = ""
    # postgresql://… ; empty for SQLite in the data folder.
    database_url: str = ""
    # "local", or s3://bucket/prefix with credentials by boto3's usual chain.
    object_store: str = "local"
    s3_endpoint_url: str = ""
    # The endpoint as workers reach it, when that differs.
    s3_public_endpoint_url: str = ""
    s3_region: str = "us-east-1"
    s3_path_style: bool = True
    # Life of a signed URL, in seconds.
    url_ttl_seconds: _Seconds = 3600.0
    # How long a worker may call before it has to show its key again.
    credential_seconds: _Seconds = 900.0
    # Whether anybody may read runs, experts and the clustering model without a token.
    public_catalog: bool = True
    # Calls served at once.
    threads: Annotated[int, Field(ge=2, le=1024)] = 32
    # Calls a second of one credential; and of one address, without one, with one that is not good, and to register a
    # worker. Ten seconds' worth may come at once, and ten minutes' of registrations. 0: no limit, for coordinators
    # behind a proxy that hides addresses.
    calls_per_second: _Rate = 50.0
    anonymous_calls_per_second: _Rate = 20.0
    refusals_per_second: _Rate = 5.0
    registrations_per_second: _Rate = 1.0
    # Connections of one address to the object endpoint at once; 0: no limit.
    http_connections_per_address: _Count = 512
    # Of one worker, over all coordinators: live leases; and whole checkpoints of one run begun and not committed. 0: no
    # limit.
    leases_per_worker: _Count = 4
    uploads_per_worker: _Count = 8
    # Connections to PostgreSQL. A few keep one process busy; more pay only where the database is far away.
    database_connections: Annotated[int, Field(ge=1, le=1024)] = 4
    # How often leases are looked at, in seconds.
    reaper_seconds: _Seconds = 2.0
    # Objects that nothing knows are deleted after this long.
    orphan_grace_seconds: _Seconds = 86_400.0
    # How often they are looked for.
    orphan_seconds: _Seconds = 3600.0
    # Calls in progress get this long when the process is told to stop.
    drain_seconds: _Seconds = 20.0

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        given: Any = init_settings
        data_dir = Path(given.init_kwargs.get("data_dir") or os.environ.get("CBTM_DATA_DIR") or DEFAULT_DATA_DIR)
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, data_dir / CONFIG_NAME)

    @property
    def registry_url(self) -> str:
        return self.database_url or f"sqlite:///{(self.data_dir / 'registry.db').absolute()}"

    @property
    def storage_location(self) -> str:
        return f"local:{(self.data_dir / 'objects').absolute()}" if self.object_store == "local" else self.object_store

    @property
    def rates(self) -> Rates:
        return Rates(
            calls=self.calls_per_second,
            anonymous_calls=self.anonymous_calls_per_second,
            refusals=self.refusals_per_second,
            registrations=self.registrations_per_second,
        )

    @property
    def quotas(self) -> Quotas:
        return Quotas(leases=self.leases_per_worker, uploads=self.uploads_per_worker)

    @property
    def url_ttl(self) -> timedelta:
        return timedelta(seconds=self.url_ttl_seconds)


def load_config(**flags: Any) -> CoordinatorConfig:
    """From flags (None: not given), environment and file. Raises InvalidArgument, naming the field."""
    try:
        return CoordinatorConfig(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        sources = f"flag, CBTM_{field.upper()} or {CONFIG_NAME}"
        raise InvalidArgument(f"{field}: {first['msg']} ({sources})", field=field) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{CONFIG_NAME}: {error}", field=CONFIG_NAME) from error
