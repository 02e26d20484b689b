"""Ids sort by time; secrets are random and only their hash is kept."""

from __future__ import annotations

import re
import uuid

import pytest

from cbtm_common import ids


def test_ids_of_later_milliseconds_sort_after_those_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0, 1, 999, 1_000, 1_700_000_000_000, 2**48 - 1]
    made = []
    for milliseconds in times:
        monkeypatch.setattr("time.time_ns", lambda at=milliseconds: at * 1_000_000)
        made.append(ids.new_id("run"))
    assert made == sorted(made)


def test_an_id_is_its_prefix_and_26_characters_that_cannot_be_mistaken() -> None:
    made = {ids.new_id("task") for _ in range(1_000)}
    assert len(made) == 1_000
    assert all(re.fullmatch(r"task_[0-9a-hjkmnp-tv-z]{26}", one) for one in made)


def test_a_clusters_id_is_known_before_it_is_registered() -> None:
    assert ids.cluster_id("run_1", 7) == "run_1-c0007"
    assert ids.cluster_id("run_1", 12_345) == "run_1-c12345"


def test_request_ids_are_uuids() -> None:
    assert uuid.UUID(ids.new_request_id()) != uuid.UUID(ids.new_request_id())


def test_a_secret_shows_its_role_and_carries_256_bits() -> None:
    secret = ids.new_secret("worker")
    assert re.fullmatch(r"cbtm_worker_[A-Za-z0-9_-]{43}", secret)
    assert secret != ids.new_secret("worker")


def test_a_secrets_hash_is_sha256() -> None:
    assert ids.hash_secret("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
