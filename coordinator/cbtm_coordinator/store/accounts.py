"""Accounts: who stands behind workers and tokens. A person or a group; never a machine.

Workers belong to the account of the token that they joined with, so one account has as many as it likes. What is about
trust (whose work may judge whose, how much anybody may take) counts accounts, since workers cost nothing to make.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import Connection, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from cbtm_common.errors import NotFound
from cbtm_common.ids import new_id
from cbtm_coordinator.tables import accounts

_INSERT = {
    dialect.__name__.rpartition(".")[2]: dialect.insert(accounts).on_conflict_do_nothing(
        index_elements=[accounts.c.name]
    )
    for dialect in (postgresql, sqlite)
}


def named(tx: Connection, now: datetime, name: str) -> str:
    """The id of the account with this name, made if there is none."""
    tx.execute(_INSERT[tx.dialect.name], {"id": new_id("account"), "name": name, "create_time": now})
    found: str = tx.execute(select(accounts.c.id).where(accounts.c.name == name)).scalar_one()
    return found


def names(tx: Connection, account_ids: Iterable[str]) -> dict[str, str]:
    """Names by id."""
    rows = tx.execute(select(accounts.c.id, accounts.c.name).where(accounts.c.id.in_(set(account_ids))))
    return {row.id: row.name for row in rows}


def find(tx: Connection, account: str) -> str:
    """The id of an account by its id or name. Raises NotFound."""
    query = select(accounts.c.id).where(or_(accounts.c.id == account, accounts.c.name == account))
    found = tx.execute(query.order_by(accounts.c.id != account).limit(1)).scalar_one_or_none()
    if found is None:
        raise NotFound(f"there is no account {account!r}; `cbtm-coord leaderboard` shows them")
    return str(found)
