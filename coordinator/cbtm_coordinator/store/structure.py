"""What is known of the weights of runs and checkpoints: JSON of `cbtm_coordinator.structure.architecture`."""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, insert, select

from cbtm_coordinator.tables import architectures, checkpoint_sizes


def add_architecture(tx: Connection, run_id: str, architecture_json: str) -> None:
    """Of a run that has files of its own. Nothing happens when it is known: the base model does not change."""
    if architecture(tx, run_id) is None:
        tx.execute(insert(architectures).values(run_id=run_id, architecture_json=architecture_json))


_ARCHITECTURE = select(architectures.c.architecture_json).where(architectures.c.run_id == bindparam("of_run"))


def architecture(tx: Connection, run_id: str) -> str | None:
    return tx.execute(_ARCHITECTURE, {"of_run": run_id}).scalar_one_or_none()


def add_sizes(tx: Connection, checkpoint_id: str, sizes_json: str) -> None:
    tx.execute(insert(checkpoint_sizes).values(checkpoint_id=checkpoint_id, sizes_json=sizes_json))


_SIZES = select(checkpoint_sizes.c.sizes_json).where(checkpoint_sizes.c.checkpoint_id == bindparam("of_checkpoint"))


def sizes(tx: Connection, checkpoint_id: str) -> str | None:
    """None of a checkpoint that an older version committed."""
    return tx.execute(_SIZES, {"of_checkpoint": checkpoint_id}).scalar_one_or_none()
