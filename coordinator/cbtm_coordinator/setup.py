"""Makes a coordinator's data folder: schema, signing key, admin token, first join token. Can be run again."""

from __future__ import annotations

import os
from pathlib import Path

from cbtm_common.errors import InvalidArgument
from cbtm_common.ids import hash_secret, new_id, new_secret
from cbtm_coordinator import migrations
from cbtm_coordinator.config import (
    ADMIN_TOKEN_NAME,
    JOIN_TOKEN_NAME,
    RECEIPT_KEY_NAME,
    SIGNING_KEY_NAME,
    CoordinatorConfig,
)
from cbtm_coordinator.storage import load_or_create_key
from cbtm_coordinator.store import Store, identities


def initialise(config: CoordinatorConfig) -> bool:
    """Whether anything had to be made. Secrets are readable by their owner alone."""
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(
            f"data_dir: {config.data_dir} cannot be made a folder ({error.strerror}); pass another with --data-dir",
            field="data_dir",
        ) from error
    store = Store(config.registry_url)
    store.ping()
    migrations.upgrade(store.engine)
    load_or_create_key(config.data_dir / SIGNING_KEY_NAME)
    load_or_create_key(config.data_dir / RECEIPT_KEY_NAME)
    made = False
    for name, role, account in ((ADMIN_TOKEN_NAME, "ADMIN", "owner"), (JOIN_TOKEN_NAME, "WORKER", "volunteers")):
        path = config.data_dir / name
        # A file whose secret the registry never knew: a crash came between the two, or the registry is a new one.
        secret = path.read_text("utf-8").strip() if path.exists() else new_secret(role.lower())
        with store.writing() as tx:
            if identities.knows_secret(tx, hash_secret(secret)):
                continue
            identities.create_token(
                tx,
                store.now(),
                token_id=new_id("token"),
                role=role,
                secret_hash=hash_secret(secret),
                label="made by init",
                account=account,
            )
            # Inside the transaction: a token without its file would be of no use to anybody.
            write_private(path, secret)
        made = True
    store.close()
    return made


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, path)
