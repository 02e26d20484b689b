"""Runs, their files, clusters, shards, and what may be done to them in which state."""

from __future__ import annotations

import pytest

from cbtm_common.errors import AlreadyExists, InvalidArgument, InvalidState, NotFound
from cbtm_common.ids import cluster_id
from cbtm_coordinator.lifecycle import RunState
from cbtm_coordinator.store import events, runs, tasks
from cbtm_coordinator.store.records import RunRecord
from tests.support.registry import RECIPE, Registry, all_at_once, file, new_cluster


def _draft(registry: Registry, name: str = "web", *, clusters: int = 3, baseline_of: str | None = None) -> RunRecord:
    with registry.store.writing() as tx:
        return runs.create(
            tx,
            registry.clock(),
            name=name,
            cluster_count=clusters,
            recipe=RECIPE,
            from_scratch=False,
            baseline_of=baseline_of,
        )


def test_a_run_is_found_by_id_and_by_name(registry: Registry) -> None:
    run = _draft(registry)
    assert run.state is RunState.DRAFT
    with registry.store.reading() as tx:
        assert runs.get(tx, run.id) == runs.get(tx, "web") == run
        with pytest.raises(NotFound, match="'gone'"):
            runs.get(tx, "gone")


def test_an_id_is_not_shadowed_by_another_run_of_that_name(registry: Registry) -> None:
    run = _draft(registry)
    _draft(registry, run.id)
    with registry.store.reading() as tx:
        assert runs.get(tx, run.id).name == "web"


def test_a_name_is_given_once_also_to_many_who_ask_at_once(registry: Registry) -> None:
    results = all_at_once(6, lambda _: _draft(registry))
    assert sum(isinstance(r, RunRecord) for r in results) == 1
    assert sum(isinstance(r, AlreadyExists) for r in results) == 5


def test_runs_are_listed_page_by_page_in_the_order_of_their_making(registry: Registry) -> None:
    made = [_draft(registry, f"run-{i}").id for i in range(5)]
    listed: list[str] = []
    while True:
        with registry.store.reading() as tx:
            page = runs.list_runs(tx, after_id=listed[-1] if listed else "", limit=2)
        listed += [run.id for run in page]
        if len(page) < 2:
            break
    assert listed == sorted(made)


def test_clusters_are_registered_some_at_a_time_and_add_up(registry: Registry) -> None:
    run = _draft(registry)
    with registry.store.writing() as tx:
        runs.register_clusters(tx, run, [new_cluster(run, 2)])
        found = runs.register_clusters(tx, run, [new_cluster(run, 0), new_cluster(run, 1)])
        total = runs.get(tx, run.id)
    assert [c.id for c in found] == [cluster_id(run.id, i) for i in range(3)]
    assert (found[0].train_tokens, found[0].held_out_tokens) == (2000, 100)
    assert (total.train_tokens, total.documents) == (6000, 63)


def test_a_cluster_is_registered_once_and_only_with_a_place_in_the_clustering(registry: Registry) -> None:
    run = _draft(registry)
    with registry.store.writing() as tx:
        runs.register_clusters(tx, run, [new_cluster(run, 0)])
    with pytest.raises(AlreadyExists), registry.store.writing() as tx:
        runs.register_clusters(tx, run, [new_cluster(run, 0)])
    with pytest.raises(InvalidArgument, match=r"0\.\.2"), registry.store.writing() as tx:
        runs.register_clusters(tx, run, [new_cluster(run, 3)])
    with registry.store.reading() as tx:
        assert len(runs.list_clusters(tx, run)) == 1


def test_shards_come_in_training_order_page_by_page(registry: Registry) -> None:
    run = _draft(registry)
    with registry.store.writing() as tx:
        runs.register_clusters(tx, run, [new_cluster(run, i, shards=3) for i in (2, 0, 1)])
    seen: list[tuple[int, str, int]] = []
    while True:
        with registry.store.reading() as tx:
            page = runs.list_shards(tx, run.id, split="TRAIN", after=seen[-1] if seen else None, limit=4)
        seen += [(index, shard.split, shard.ordinal) for index, shard in page]
        if len(page) < 4:
            break
    assert seen == [(i, "TRAIN", o) for i in range(3) for o in range(3)]


def test_held_out_shards_are_not_among_those_to_train_on(registry: Registry) -> None:
    run = _draft(registry)
    with registry.store.writing() as tx:
        (cluster,) = runs.register_clusters(tx, run, [new_cluster(run, 1)])
        train = runs.list_shards(tx, run.id, split="TRAIN", cluster_id=cluster.id)
        held_out = runs.list_shards(tx, run.id, split="HELD_OUT")
        by_key = runs.list_shards(tx, run.id, keys=[held_out[0][1].key])
    assert {shard.split for _, shard in train} == {"TRAIN"}
    assert [shard.tokens for _, shard in held_out] == [100]
    assert by_key == held_out


def test_a_file_added_again_replaces_the_first(registry: Registry) -> None:
    run = _draft(registry)
    with registry.store.writing() as tx:
        runs.add_files(tx, run.id, "TOKENIZER", [file("tokenizer.json", content="one")])
        runs.add_files(tx, run.id, "TOKENIZER", [file("tokenizer.json", content="two")])
        runs.add_files(tx, run.id, "REPORT", [file("report.json")])
        assert [f.file for f in runs.files(tx, run, "TOKENIZER")] == [file("tokenizer.json", content="two")]
        assert [f.kind for f in runs.files(tx, run)] == ["REPORT", "TOKENIZER"]


def test_a_baseline_reads_its_runs_files_and_keeps_that_run_alive(registry: Registry) -> None:
    run = registry.run()
    baseline = _draft(registry, "web-dense", clusters=1, baseline_of=run.id)
    with registry.store.writing() as tx:
        assert runs.files(tx, baseline) == runs.files(tx, run)
        assert baseline.data_run_id == run.id
        with pytest.raises(InvalidState, match="web-dense"):
            runs.remove(tx, registry.clock(), run)
        runs.remove(tx, registry.clock(), baseline)
        runs.remove(tx, registry.clock(), run)
        assert runs.list_runs(tx) == []


def test_a_deleted_run_leaves_its_events_and_nothing_else(registry: Registry) -> None:
    run = registry.run()
    registry.save(registry.lease(), 10)
    with registry.store.writing() as tx:
        runs.remove(tx, registry.clock(), run)
    with registry.store.reading() as tx:
        assert tasks.list_tasks(tx, run.id) == []
        assert runs.list_shards(tx, run.id) == []
        assert events.list_events(tx, run_id=run.id)[-1].kind == "run.deleted"


def test_a_change_of_state_that_another_process_made_first_is_refused(registry: Registry) -> None:
    stale = _draft(registry)
    with registry.store.writing() as tx:
        runs.change_state(tx, registry.clock(), stale, "register", "")
    with registry.store.writing() as tx, pytest.raises(InvalidState, match="no longer DRAFT"):
        runs.change_state(tx, registry.clock(), stale, "register", "")


def test_pausing_is_for_runs_that_run_and_is_noted_once(registry: Registry) -> None:
    draft = _draft(registry, "draft")
    run = registry.run()
    with registry.store.writing() as tx:
        with pytest.raises(InvalidState, match="nothing to pause"):
            runs.set_paused(tx, registry.clock(), draft, True)
        paused = runs.set_paused(tx, registry.clock(), run, True)
        again = runs.set_paused(tx, registry.clock(), paused, True)
        kinds = [e.kind for e in events.list_events(tx, run_id=run.id)]
    assert again.paused
    assert kinds.count("run.paused") == 1


def test_object_keys_of_a_run_are_known(registry: Registry) -> None:
    run = registry.run()
    with registry.store.reading() as tx:
        (_, shard), *_ = runs.list_shards(tx, run.id)
        (model,) = runs.files(tx, run, "BASE_MODEL")
        assert runs.knows_key(tx, run.id, shard.key)
        assert runs.knows_key(tx, run.id, model.key)
        assert not runs.knows_key(tx, run.id, "runs/other/base/x")
