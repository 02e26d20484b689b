"""The invariants, looked at from outside: by SQL and S3 of their own, through nothing that is being tested.

Each check gives the violations that it found, as sentences. Rows are dicts, as the database has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.run_fixture import files_from_json

Row = Mapping[str, Any]
# Reads an object, by its key in the registry; None when it is not there.
ReadObject = Callable[[str], bytes | None]

VISIBLE = ("COMMITTED", "ACCEPTED")
# What is taken away or refused carries a reason that a volunteer can read.
REASONED_LEASES = ("EXPIRED", "REVOKED")
REASONED_CHECKPOINTS = ("PRUNED", "REJECTED")
REASONED_EVENTS = ("lease.expired", "lease.revoked", "checkpoint.refused", "task.failed")


def leases_overlap(leases: Sequence[Row]) -> list[str]:
    """Of one task, one lease at a time; each with a higher epoch than the one before."""
    found = []
    before: dict[str, Row] = {}
    for lease in sorted(leases, key=lambda row: (row["acquire_time"], row["epoch"])):
        last = before.get(lease["task_id"])
        if last is not None:
            if last["end_time"] is None or last["end_time"] > lease["acquire_time"]:
                found.append(f"leases {last['id']} and {lease['id']} of {lease['task_id']} overlap")
            if lease["epoch"] <= last["epoch"]:
                found.append(f"lease {lease['id']} has epoch {lease['epoch']} after {last['epoch']}")
        before[lease["task_id"]] = lease
    return found


def checkpoints_wrong(checkpoints: Sequence[Row], read: ReadObject) -> list[str]:
    """Of a visible checkpoint every object is there, and is what the registry says."""
    return [
        f"checkpoint {row['id']} of step {row['step']} is {row['state']}: {why}"
        for row in checkpoints
        if row["state"] in VISIBLE
        for why in objects_wrong(row["files_json"], read)
    ]


def objects_wrong(files_json: str, read: ReadObject) -> list[str]:
    found = []
    for file in files_from_json(files_json):
        data = read(file.key)
        if data is None:
            found.append(f"{file.key} is missing")
        elif len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
            found.append(f"{file.key} holds other bytes")
    return found


def experts_differ(experts: Sequence[Row], undisturbed: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Every version of every expert has the weights of the undisturbed run, bit for bit."""
    found = []
    for row in experts:
        files = {file.path: file.sha256 for file in files_from_json(row["files_json"])}
        if files != undisturbed[row["cluster_index"]]:
            found.append(f"version {row['version']} of cluster {row['cluster_index']}'s expert has other weights")
    return found


def unfinished(tasks: Sequence[Row]) -> list[str]:
    return [f"task {row['id']} is {row['state']} ({row['reason']})" for row in tasks if row["state"] != "DONE"]


def reasons_missing(leases: Sequence[Row], checkpoints: Sequence[Row], events: Sequence[Row]) -> list[str]:
    silent = [
        *(row for row in leases if row["state"] in REASONED_LEASES),
        *(row for row in checkpoints if row["state"] in REASONED_CHECKPOINTS),
        *(row for row in events if row["kind"] in REASONED_EVENTS),
    ]
    return [f"{row['id']} ({row.get('state') or row['kind']}) has no reason" for row in silent if not row["reason"]]


def orphans(keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """Objects that nothing in the registry knows."""
    return [f"nothing knows the object {key}" for key in sorted(set(keys) - set(known))]


def known_keys(
    files: Sequence[Row], shards: Sequence[Row], experts: Sequence[Row], checkpoints: Sequence[Row]
) -> set[str]:
    """Keys of all objects that the registry refers to."""
    listed = [
        *(row["files_json"] for row in experts),
        *(row["files_json"] for row in checkpoints if row["state"] not in REASONED_CHECKPOINTS),
    ]
    return {
        *(row["key"] for row in files),
        *(row["key"] for row in shards),
        *(file.key for text in listed for file in files_from_json(text)),
    }


def tracebacks(log: str) -> list[str]:
    """Defects that a process told of in its log: the last line of each traceback."""
    found = []
    lines = iter(log.splitlines())
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            last = line
            for last in lines:
                if last and not last[0].isspace():
                    break
            found.append(f"a traceback: {last}")
    return found


@dataclass(kw_only=True)
class Watch:
    """What may be seen at any moment, from one look to the next."""

    violations: list[str] = field(default_factory=list)
    looks: int = 0
    _epochs: dict[str, int] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)
    _restarts: dict[str, int] = field(default_factory=dict)

    def look(self, tasks: Sequence[Row], live: Sequence[Row], restarts: Mapping[str, int]) -> None:
        """`live`: the live leases. `restarts`: how often each task was put back to step 0 by its owner."""
        self.looks += 1
        holders: dict[str, str] = {}
        for lease in live:
            other = holders.setdefault(lease["task_id"], lease["id"])
            if other != lease["id"]:
                self.violations.append(f"leases {other} and {lease['id']} of {lease['task_id']} are live at once")
        for task in tasks:
            name, epoch, step = task["id"], task["epoch"], task["committed_step"]
            if epoch < self._epochs.get(name, 0):
                self.violations.append(f"the epoch of {name} fell from {self._epochs[name]} to {epoch}")
            restarted = restarts.get(name, 0) != self._restarts.get(name, 0)
            if step < self._steps.get(name, 0) and not restarted:
                self.violations.append(f"{name} lost committed work: from step {self._steps[name]} to {step}")
            self._epochs[name], self._steps[name], self._restarts[name] = epoch, step, restarts.get(name, 0)
