"""Makes a coordinator's data folder: schema, keys, certificates, admin token, first join token. Can be run again."""

from __future__ import annotations

from cbtm_common.errors import InvalidArgument
from cbtm_common.ids import hash_secret, new_id, new_secret
from cbtm_common.security import join_token, split_token
from cbtm_coordinator import migrations
from cbtm_coordinator.config import (
    ADMIN_TOKEN_NAME,
    JOIN_TOKEN_NAME,
    RECEIPT_KEY_NAME,
    SIGNING_KEY_NAME,
    CoordinatorConfig,
)
from cbtm_coordinator.private_files import write_private
from cbtm_coordinator.storage import load_or_create_key
from cbtm_coordinator.store import Store, identities
from cbtm_coordinator.tls import Certificates


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
    fingerprint = "" if config.insecure else Certificates(config).fingerprint
    made = False
    for name, role, account in ((ADMIN_TOKEN_NAME, "ADMIN", "owner"), (JOIN_TOKEN_NAME, "WORKER", "volunteers")):
        path = config.data_dir / name
        # A file whose secret the registry never knew: a crash came between the two, or the registry is a new one.
        secret = split_token(path.read_text("utf-8"))[0] if path.exists() else new_secret(role.lower())
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
            write_private(path, join_token(secret, fingerprint))
        made = True
    store.close()
    return made


def name_authority(config: CoordinatorConfig, fingerprint: str) -> None:
    """Lets the tokens in the data folder name the authority that is served with now, or none."""
    for name in (ADMIN_TOKEN_NAME, JOIN_TOKEN_NAME):
        path = config.data_dir / name
        if not path.exists():
            continue
        found = path.read_text("utf-8").strip()
        wanted = join_token(split_token(found)[0], fingerprint)
        if found != wanted:
            write_private(path, wanted)
