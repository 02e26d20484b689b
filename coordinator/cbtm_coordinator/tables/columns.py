"""What the tables share: naming of constraints, times in UTC, and the columns that stand in many of them."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    MetaData,
    String,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.engine import Dialect

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC on every database; SQLite alone would give naive ones back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("a datetime without a time zone does not enter the registry")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def one_of(column: str, states: type[StrEnum]) -> CheckConstraint:
    """A closed set: the column holds one of the values of `states`."""
    names = ", ".join(f"'{s.value}'" for s in states)
    return CheckConstraint(f"{column} IN ({names})", name=column)


def identifier() -> Column[str]:
    return Column("id", String(64), primary_key=True)


def ref(name: str, target: str, **options: Any) -> Column[str]:
    """A reference: the row goes with the one that it names."""
    return Column(name, String(64), ForeignKey(f"{target}.id", ondelete="CASCADE"), **options)


def count(name: str) -> Column[int]:
    """A whole number that begins at 0."""
    return Column(name, BigInteger, nullable=False, server_default=text("0"))


def time(name: str, *, nullable: bool = False) -> Column[datetime]:
    return Column(name, UtcDateTime, nullable=nullable)


def words(name: str) -> Column[str]:
    """Text that is empty rather than NULL."""
    return Column(name, Text, nullable=False, server_default=text("''"))
