"""`init`: a data folder that is made once, mended when a crash left it half made, and never loses its secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_common.ids import hash_secret
from cbtm_common.security import split_token
from cbtm_coordinator.config import ADMIN_TOKEN_NAME, JOIN_TOKEN_NAME, SIGNING_KEY_NAME, CoordinatorConfig
from cbtm_coordinator.setup import initialise
from cbtm_coordinator.store import Store, identities

SECRETS = (ADMIN_TOKEN_NAME, JOIN_TOKEN_NAME, SIGNING_KEY_NAME)


def known_roles(config: CoordinatorConfig) -> list[str]:
    """Roles of the tokens in the folder's files, as the registry has them."""
    store = Store(config.registry_url)
    roles = []
    with store.reading() as tx:
        for name in (ADMIN_TOKEN_NAME, JOIN_TOKEN_NAME):
            secret, _ = split_token((config.data_dir / name).read_text("utf-8"))
            found = identities.find_token(tx, store.now(), hash_secret(secret))
            roles.append(found.role if found else "unknown")
    store.close()
    return roles


def test_init_makes_secrets_for_their_owner_alone_and_a_second_one_changes_nothing(tmp_path: Path) -> None:
    config = CoordinatorConfig(data_dir=tmp_path / "data")
    assert initialise(config)
    before = {name: (config.data_dir / name).read_bytes() for name in SECRETS}
    assert {(config.data_dir / name).stat().st_mode & 0o777 for name in SECRETS} == {0o600}
    assert known_roles(config) == ["ADMIN", "WORKER"]
    assert not initialise(config)
    assert before == {name: (config.data_dir / name).read_bytes() for name in SECRETS}


def test_a_new_registry_takes_over_the_tokens_of_the_folder(tmp_path: Path) -> None:
    config = CoordinatorConfig(data_dir=tmp_path / "data")
    initialise(config)
    token = (config.data_dir / ADMIN_TOKEN_NAME).read_text("utf-8")
    for leftover in config.data_dir.glob("registry.db*"):
        leftover.unlink()
    assert initialise(config)
    assert (config.data_dir / ADMIN_TOKEN_NAME).read_text("utf-8") == token
    assert known_roles(config) == ["ADMIN", "WORKER"]


def test_a_path_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(InvalidArgument, match="data_dir"):
        initialise(CoordinatorConfig(data_dir=tmp_path / "data"))
