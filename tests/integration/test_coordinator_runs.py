"""Making a run, reading it, deleting it, call by call against a real coordinator."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import AlreadyExists, CbtmError, InvalidArgument, InvalidState, LeaseLost, NotFound
from cbtm_common.ids import cluster_id, new_request_id
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import MAX_MESSAGE_BYTES, Connection
from cbtm_common.run_routing import RunRouting
from tests.support.coordinator import RunningCoordinator
from tests.support.raw_run import RECIPE, STEPS, RawWorker, calibrated, checkpoint_folder, create_run, make_run

pytestmark = pytest.mark.integration


@pytest.fixture
def run(admin: Connection, tmp_path: Path) -> Iterator[pb.Run]:
    """A started run of three clusters."""
    made = make_run(admin, tmp_path, clusters=3)
    yield made
    with contextlib.suppress(NotFound):
        _delete(admin, made.id)


@pytest.fixture
def draft(admin: Connection) -> Iterator[pb.Run]:
    made = create_run(admin, name="draft", clusters=1)
    yield made
    _delete(admin, made.id)


def _delete(admin: Connection, run: str, request_id: str = "") -> ad.DeleteRunResponse:
    return admin.admin.DeleteRun(ad.DeleteRunRequest(request_id=request_id or new_request_id(), run=run))


def _stored(coordinator: RunningCoordinator, run: pb.Run) -> list[Path]:
    folder = coordinator.data_dir / "objects" / "objects" / "runs" / run.id
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_name_is_given_once_and_again_when_its_run_is_deleted(admin: Connection) -> None:
    first = create_run(admin, name="once")
    with pytest.raises(AlreadyExists, match="once"):
        create_run(admin, name="once")
    _delete(admin, "once")
    second = create_run(admin, name="once")
    assert second.id != first.id
    _delete(admin, second.id)


def test_every_step_of_making_a_run_may_be_repeated(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run
) -> None:
    create = ad.CreateRunRequest(
        request_id=new_request_id(), name="twice", cluster_count=1, recipe_json=RECIPE.to_json()
    )
    made = admin.admin.CreateRun(create)
    assert admin.admin.CreateRun(create) == made
    deleting = new_request_id()
    assert _delete(admin, "twice", deleting) == _delete(admin, "twice", deleting)
    baseline = ad.CreateBaselineRequest(request_id=new_request_id(), run=run.id)
    assert admin.admin.CreateBaseline(baseline) == admin.admin.CreateBaseline(baseline)
    _delete(admin, "web-dense")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "../up"}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"cluster_count": 0}, "cluster_count"),
        ({"cluster_count": 65_537}, "cluster_count"),
        ({"recipe_json": "{"}, "recipe_json"),
        ({"recipe_json": '{"steps": 0}'}, "steps"),
    ],
)
def test_a_run_that_is_badly_described_is_refused(admin: Connection, fields: dict[str, str | int], field: str) -> None:
    good: dict[str, str | int] = {"name": "bad", "cluster_count": 1, "recipe_json": RECIPE.to_json()}
    request = ad.CreateRunRequest(request_id=new_request_id(), **{**good, **fields})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as caught:
        admin.admin.CreateRun(request)
    assert caught.value.field == field


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a\\b", ""])
def test_files_of_a_run_stay_in_its_folder(admin: Connection, draft: pb.Run, path: str) -> None:
    file = pb.FileSpec(path=path, size=1, sha256="0" * 64)
    with pytest.raises(InvalidArgument, match="path"):
        admin.admin.PrepareRunUpload(
            ad.PrepareRunUploadRequest(
                request_id=new_request_id(), run_id=draft.id, kind=ad.RUN_FILE_KIND_TOKENIZER, files=[file]
            )
        )


def test_a_run_starts_only_with_all_its_files_and_clusters(admin: Connection, draft: pb.Run) -> None:
    start = ad.StartRunRequest(request_id=new_request_id(), run_id=draft.id)
    with pytest.raises(InvalidState, match=r"no .* files yet"):
        admin.admin.StartRun(start)
    digest = hashlib.sha256(b"x").hexdigest()
    file = pb.FileSpec(path="tokenizer.json", size=1, sha256=digest)
    admin.admin.PrepareRunUpload(
        ad.PrepareRunUploadRequest(
            request_id=new_request_id(), run_id=draft.id, kind=ad.RUN_FILE_KIND_TOKENIZER, files=[file]
        )
    )
    with pytest.raises(NotFound, match="tokenizer"):
        admin.admin.StartRun(start)
    assert admin.catalog.GetRun(cs.GetRunRequest(run="draft")).run.state == pb.RUN_STATE_DRAFT


def test_a_started_run_takes_no_more_files(admin: Connection, run: pb.Run) -> None:
    file = pb.FileSpec(path="tokenizer.json", size=1, sha256="0" * 64)
    with pytest.raises(InvalidState, match="DRAFT"):
        admin.admin.PrepareRunUpload(
            ad.PrepareRunUploadRequest(
                request_id=new_request_id(), run_id=run.id, kind=ad.RUN_FILE_KIND_TOKENIZER, files=[file]
            )
        )


def test_a_baseline_trains_on_every_cluster_as_long_as_all_of_them_together(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, tmp_path: Path
) -> None:
    baseline = admin.admin.CreateBaseline(ad.CreateBaselineRequest(request_id=new_request_id(), run="web")).run
    assert (baseline.name, baseline.cluster_count) == ("web-dense", 1)
    assert baseline.budget_tokens == run.budget_tokens
    with pytest.raises(InvalidState, match="web-dense"):
        _delete(admin, "web")
    with contextlib.closing(RawWorker(coordinator)) as worker:
        answer = worker.acquire(run="web-dense")
        assert answer.spec.task.total_steps == 3 * STEPS
        shards = worker.calls.ListTaskShards(
            ws.ListTaskShardsRequest(lease_id=answer.lease.id, epoch=answer.lease.epoch)
        ).shards
        assert {shard.cluster_id for shard in shards} == {cluster_id(run.id, index) for index in range(3)}
        worker.download(answer.lease, [shard.file for shard in shards], tmp_path / "cache")
        worker.save(answer.lease, 3 * STEPS, checkpoint_folder(tmp_path / "final", final=True))
        worker.release(answer.lease)
    assert admin.catalog.GetRun(cs.GetRunRequest(run="web-dense")).run.state == pb.RUN_STATE_COMPLETE
    routed = admin.catalog.Route(cs.RouteRequest(run="web-dense", texts=["anything"])).routings
    assert [(w.cluster_index, w.weight) for w in routed[0].weights] == [(0, 1.0)]
    _delete(admin, "web-dense")


def test_a_baseline_may_have_another_batch_and_rate_for_as_many_tokens(admin: Connection, run: pb.Run) -> None:
    request = ad.CreateBaselineRequest(
        request_id=new_request_id(), run="web", name="big", global_batch=3, learning_rate=0.5
    )
    made = admin.admin.CreateBaseline(request).run
    recipe = Recipe.from_json(made.recipe_json)
    assert (recipe.global_batch, recipe.optimizer.learning_rate) == (3, 0.5)
    status = admin.admin.GetRunStatus(ad.GetRunStatusRequest(run="big"))
    assert [task.task.total_steps for task in status.tasks] == [STEPS]
    assert made.budget_tokens == run.budget_tokens
    _delete(admin, "big")


def _set_routing(admin: Connection, run: str, routing_json: str) -> pb.Run:
    request = ad.SetRunRoutingRequest(request_id=new_request_id(), run=run, routing_json=routing_json)
    return admin.admin.SetRunRouting(request).run


def test_a_calibrated_routing_stays_with_the_run_and_is_what_texts_are_routed_by(
    admin: Connection, run: pb.Run
) -> None:
    def weights(temperature: float = 0) -> list[float]:
        request = cs.RouteRequest(run=run.id, texts=["term0 term0 term1"], temperature=temperature)
        return [w.weight for w in admin.catalog.Route(request).routings[0].weights]

    before = weights()
    routing = calibrated(admin, run, temperature=0.7, interval=16, settle_after=32)
    assert RunRouting.from_json(_set_routing(admin, "web", routing.to_json()).routing_json) == routing
    assert RunRouting.from_json(admin.catalog.GetRun(cs.GetRunRequest(run="web")).run.routing_json) == routing
    assert weights() == weights(0.7) != before
    assert weights(0.1) == before
    assert _set_routing(admin, "web", "").routing_json == ""
    assert weights() == before
    kept = [e for e in admin.admin.ListEvents(ad.ListEventsRequest(run=run.id)).events if e.kind == "run.routing"]
    assert [dict(event.detail).get("interval") for event in kept] == [16, None]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": 0}, "routing_json.temperature"),
        ({"settle_after": 0}, "routing_json.settle_after"),
        ({"top_k": 4}, "routing_json.top_k"),
        ({"clustering": "0" * 64}, "routing_json.clustering"),
        ({"clustering": None}, "routing_json.clustering"),
    ],
)
def test_a_routing_that_cannot_be_of_this_run_is_refused(
    admin: Connection, run: pb.Run, fields: dict[str, object], field: str
) -> None:
    values = {**calibrated(admin, run).model_dump(), **fields}
    with pytest.raises(InvalidArgument) as caught:
        _set_routing(admin, run.id, json.dumps(values))
    assert caught.value.field == field
    assert admin.catalog.GetRun(cs.GetRunRequest(run=run.id)).run.routing_json == ""


def test_a_draft_and_a_baseline_have_nothing_to_route_between(admin: Connection, draft: pb.Run, run: pb.Run) -> None:
    with pytest.raises(InvalidState, match="DRAFT"):
        _set_routing(admin, draft.id, "")
    baseline = admin.admin.CreateBaseline(ad.CreateBaselineRequest(request_id=new_request_id(), run=run.id)).run
    with pytest.raises(InvalidState, match="baseline"):
        _set_routing(admin, baseline.id, "")
    _delete(admin, baseline.id)


@pytest.mark.parametrize(
    ("field", "value"), [("global_batch", -1), ("learning_rate", -0.1), ("learning_rate", math.nan)]
)
def test_a_baseline_with_no_such_batch_or_rate_is_refused(
    admin: Connection, run: pb.Run, field: str, value: float
) -> None:
    with pytest.raises(InvalidArgument, match=field):
        admin.admin.CreateBaseline(
            ad.CreateBaselineRequest(request_id=new_request_id(), run="web", name="no", **{field: value})  # type: ignore[arg-type]
        )


def test_a_deleted_run_leaves_no_object_and_its_workers_are_told(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, tmp_path: Path
) -> None:
    with contextlib.closing(RawWorker(coordinator)) as worker:
        lease = worker.lease()
        worker.save(lease, 3, checkpoint_folder(tmp_path / "three"))
        before = _stored(coordinator, run)
        deleting = new_request_id()
        deleted = _delete(admin, run.id, deleting)
        assert deleted.deleted_objects == len(before)
        assert not _stored(coordinator, run)
        # Again by the same request, although there is no such run any more.
        assert _delete(admin, run.id, deleting) == deleted
        with pytest.raises(LeaseLost):
            worker.renew(lease)
    with pytest.raises(NotFound):
        admin.catalog.GetRun(cs.GetRunRequest(run="web"))


def test_listings_come_page_by_page_without_gap_or_repetition(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run
) -> None:
    shards: list[str] = []
    token = ""
    for _ in range(4):
        page = admin.catalog.ListShards(cs.ListShardsRequest(run="web", page_size=2, page_token=token))
        shards += [shard.file.key for shard in page.shards]
        token = page.next_page_token
        if not token:
            break
    assert len(shards) == len(set(shards)) == 6
    clusters = admin.catalog.ListClusters(cs.ListClustersRequest(run="web", page_size=2))
    rest = admin.catalog.ListClusters(
        cs.ListClustersRequest(run="web", page_size=2, page_token=clusters.next_page_token)
    )
    assert [cluster.index for cluster in (*clusters.clusters, *rest.clusters)] == [0, 1, 2]
    with pytest.raises(InvalidArgument, match="page_token"):
        admin.catalog.ListClusters(cs.ListClustersRequest(run="web", page_token="rubbish"))
    with pytest.raises(InvalidArgument, match="page_size"):
        admin.catalog.ListClusters(cs.ListClustersRequest(run="web", page_size=-1))


def test_a_token_of_one_listing_is_refused_by_another(admin: Connection, run: pb.Run) -> None:
    token = admin.catalog.ListShards(cs.ListShardsRequest(run="web", page_size=1)).next_page_token
    with pytest.raises(InvalidArgument, match="page_token"):
        admin.catalog.ListClusters(cs.ListClustersRequest(run="web", page_token=token))
    other = admin.catalog.ListClusters(cs.ListClustersRequest(run="web", page_size=1)).next_page_token
    with pytest.raises(InvalidArgument, match="page_token"):
        admin.catalog.ListShards(cs.ListShardsRequest(run="web", page_token=other))


def test_texts_are_routed_by_the_runs_own_clustering(admin: Connection, run: pb.Run) -> None:
    texts = ["term0", "", "term2"]
    answer = admin.catalog.Route(cs.RouteRequest(run="web", texts=texts, top_k=1)).routings
    assert [routing.weights[0].cluster_index for routing in answer] == [0, 0, 2]
    every = admin.catalog.Route(cs.RouteRequest(run="web", texts=texts)).routings
    for routing in every:
        assert sum(weight.weight for weight in routing.weights) == pytest.approx(1)
        assert [w.weight for w in routing.weights] == sorted((w.weight for w in routing.weights), reverse=True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"texts": []}, "texts"),
        ({"texts": ["x"] * 65}, "texts"),
        ({"texts": ["x" * (1 << 20), "x"]}, "texts"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_a_question_for_routing_that_makes_no_sense_is_refused(
    admin: Connection, run: pb.Run, fields: dict[str, object], field: str
) -> None:
    good: dict[str, object] = {"run": "web", "texts": ["a"]}
    with pytest.raises(InvalidArgument) as caught:
        admin.catalog.Route(cs.RouteRequest(**{**good, **fields}))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_message_that_is_too_large_is_refused_as_such(admin: Connection, run: pb.Run) -> None:
    with pytest.raises(CbtmError) as caught:
        admin.catalog.Route(cs.RouteRequest(run="web", texts=["x" * (MAX_MESSAGE_BYTES + 1)]))
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_a_probe_measures_the_link_with_an_object_of_its_own(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 64
    (tmp_path / "probe").write_bytes(data)
    request = ws.ProbeRequest(transfer_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with contextlib.closing(RawWorker(coordinator)) as worker:
        answer = worker.calls.Probe(request)
        assert (answer.run_name, answer.model_parameters) == ("web", 25)
        worker.transfer.upload(answer.upload, tmp_path / "probe")
        worker.transfer.download(answer.download, tmp_path / "back")
        for bad in (-1, (16 << 20) + 1):
            with pytest.raises(InvalidArgument, match="transfer_bytes"):
                worker.calls.Probe(ws.ProbeRequest(transfer_bytes=bad))
    assert (tmp_path / "back").read_bytes() == data


def test_a_cluster_put_back_is_trained_again_beside_its_first_expert(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, tmp_path: Path
) -> None:
    def finish(worker: RawWorker, salt: int) -> None:
        lease = worker.lease()
        worker.save(lease, STEPS, checkpoint_folder(tmp_path / f"final{salt}", salt=salt, final=True))
        worker.release(lease)

    with contextlib.closing(RawWorker(coordinator)) as worker:
        for salt in range(3):
            finish(worker, salt)
        first = admin.catalog.ListExperts(cs.ListExpertsRequest(run="web"))
        put_back = ad.RequeueTaskRequest(request_id=new_request_id(), run="web", cluster_index=1)
        with pytest.raises(InvalidState, match="--from-start"):
            admin.admin.RequeueTask(put_back)
        put_back.from_start = True
        admin.admin.RequeueTask(put_back)
        between = admin.catalog.ListExperts(cs.ListExpertsRequest(run="web"))
        assert between.experts == first.experts
        finish(worker, 9)
        second = admin.catalog.ListExperts(cs.ListExpertsRequest(run="web"))
    assert second.catalog_version != first.catalog_version
    assert [expert.cluster_index for expert in second.experts] == [-1, 0, 1, 2]
    changed = [old.cluster_index for old, new in zip(first.experts, second.experts, strict=True) if old.id != new.id]
    assert changed == [1]
