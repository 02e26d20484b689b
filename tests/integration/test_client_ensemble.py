"""The ensemble against brute force: real (tiny) models, every prefix decoded and embedded afresh, full softmaxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import brute_force_log_probs, build, greedy_by_brute_force, make_parts, random_texts
from tests.support.models import EOS_TOKEN_ID

pytestmark = pytest.mark.integration

TOP_K = [1, 2, None]


def with_k(model: Any, top_k: int | None) -> Any:
    return model.with_routing(top_k="all" if top_k is None else top_k)


@pytest.mark.parametrize("top_k", TOP_K)
def test_log_probs_are_those_of_a_plain_loop_over_full_softmaxes(model: Any, top_k: int | None) -> None:
    rng = np.random.default_rng(1)
    rows = [[EOS_TOKEN_ID, *model.encode(text)][:20] for text in random_texts(3, seed=5, words=(9, 12))]
    rows.append([EOS_TOKEN_ID, *rng.integers(1, 300, size=19).tolist()])
    width = min(map(len, rows))
    found = with_k(model, top_k).log_probs([row[:width] for row in rows]).numpy()
    for b, row in enumerate(rows):
        for t in range(width):
            np.testing.assert_allclose(found[b, t], brute_force_log_probs(model, row[: t + 1], top_k=top_k), atol=1e-5)


@pytest.mark.parametrize("top_k", TOP_K)
def test_scores_are_those_of_a_plain_loop(model: Any, top_k: int | None) -> None:
    texts = random_texts(6, seed=7)
    for text, score in zip(texts, with_k(model, top_k).score(texts), strict=True):
        ids = [EOS_TOKEN_ID, *model.encode(text)][:32]
        expected = [brute_force_log_probs(model, ids[:t], top_k=top_k)[ids[t]] for t in range(1, len(ids))]
        np.testing.assert_allclose(score.token_log_probs[: len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("top_k", TOP_K)
def test_greedy_generation_equals_brute_force_step_by_step(model: Any, top_k: int | None) -> None:
    prompts = random_texts(12, seed=11, words=(1, 4))
    found = with_k(model, top_k).generate(prompts, max_new_tokens=8)
    for prompt, generation in zip(prompts, found, strict=True):
        assert list(generation.token_ids) == greedy_by_brute_force(model, prompt, top_k=top_k, tokens=8)


def test_generation_in_a_batch_equals_one_by_one_until_the_context_is_full(model: Any) -> None:
    prompts = random_texts(5, seed=13, words=(1, 6))
    together = model.generate(prompts, max_new_tokens=60)
    assert together == [model.generate(prompt, max_new_tokens=60) for prompt in prompts]
    assert {generation.finish_reason for generation in together} <= {"end", "context", "length"}


def test_scoring_in_a_batch_equals_one_by_one(model: Any) -> None:
    texts = random_texts(6, seed=17, words=(1, 30))
    together = model.score(texts)
    for text, score in zip(texts, together, strict=True):
        np.testing.assert_allclose(score.token_log_probs, model.score(text).token_log_probs, atol=1e-5)


def test_prompts_give_the_same_scores_as_the_rest_of_a_joined_text(model: Any) -> None:
    prompt, text = "river stone", " window garden"
    score = model.score(text, prompts=prompt)
    ids = [EOS_TOKEN_ID, *model.encode(prompt), *model.encode(text)]
    expected = [
        brute_force_log_probs(model, ids[:t], top_k=2)[ids[t]] for t in range(len(ids) - len(score.token_ids), len(ids))
    ]
    np.testing.assert_allclose(score.token_log_probs, expected, atol=1e-5)


def test_long_texts_are_scored_in_strided_windows_that_see_the_whole_routing_context(model: Any) -> None:
    text = " ".join(random_texts(6, seed=19, words=(9, 12)))
    ids = [EOS_TOKEN_ID, *model.encode(text)]
    assert len(ids) > 80
    one = with_k(model, 1)
    found = one.perplexity(text, window=32, stride=16)
    weights = one.context_router.positions(ids, 1)
    for t in (1, 31, 32, 33, 48, 49, 64, 79):
        start = 0 if t <= 32 else (t - 32 + 15) // 16 * 16
        row = weights[t - 1]
        expert = int(row.argmax())
        import torch

        logits = one.pool.get(expert)(input_ids=torch.tensor([ids[start:t]])).logits[0, -1]
        expected = float(torch.log_softmax(logits, dim=-1)[ids[t]])
        assert found.texts[0].token_log_probs[t - 1] == pytest.approx(expected, abs=1e-5)


def test_evicting_and_reloading_experts_changes_nothing(parts: Any, model: Any) -> None:
    texts, prompts = random_texts(4, seed=23), random_texts(3, seed=29, words=(1, 5))
    tight = build(parts, max_experts=1)
    assert tight.generate(prompts, max_new_tokens=10) == model.generate(prompts, max_new_tokens=10)
    for a, b in zip(tight.score(texts), model.score(texts), strict=True):
        np.testing.assert_allclose(a.token_log_probs, b.token_log_probs, atol=1e-6)
    assert len(tight.pool.resident) == 1
    assert tight.pool.loads > 4


def test_a_byte_budget_holds_as_many_experts_as_fit(parts: Any) -> None:
    whole = build(parts)
    whole.log_probs([[EOS_TOKEN_ID, 5, 6]])
    size = sum(p.numel() * p.element_size() for p in whole.pool.get(0).parameters())
    tight = build(parts, max_bytes=2 * size + size // 2, top_k="all")
    tight.log_probs([[EOS_TOKEN_ID, 5, 6]])
    assert len(tight.pool.resident) == 2


def test_only_experts_that_some_token_needs_are_loaded(parts: Any) -> None:
    model = build(parts, top_k=1)
    text = "river"
    weights = model.context_router.positions([EOS_TOKEN_ID, *model.encode(text)], 1)
    model.score(text)
    assert set(model.pool.resident) == set(np.flatnonzero(weights.any(axis=0)).tolist())
    assert len(model.pool.resident) < 4


def test_clusters_without_an_expert_give_their_weight_to_the_others(tmp_path: Path) -> None:
    model = build(make_parts(tmp_path, experts=4, missing=[1]))
    assert model.missing_clusters == ("run_x-c0001",)
    assert [c.index for c in model.clusters] == [0, 2, 3]
    full = model.parts.router.weights(["river stone"], temperature=0.3)[0]
    by_id = dict(zip(model.parts.router.cluster_ids, full.tolist(), strict=True))
    routing = model.with_routing(top_k="all").route("river stone")
    total = sum(by_id[c.id] for c in model.clusters)
    for weight in routing.weights:
        assert weight.weight == pytest.approx(by_id[weight.cluster_id] / total)
    ids = [EOS_TOKEN_ID, *model.encode("river stone")]
    found = model.log_probs([ids]).numpy()[0, -1]
    np.testing.assert_allclose(found, brute_force_log_probs(model, ids, top_k=2), atol=1e-5)
    assert model.perplexity("river").missing_clusters == model.missing_clusters


def test_prompt_and_fixed_routing_keep_their_weights_while_the_text_grows(model: Any) -> None:
    from cbtm._decoder import MixtureDecoder

    ids = [EOS_TOKEN_ID, *model.encode("river stone")]
    for view, expected in [
        (model.with_routing(policy="prompt"), model.context_router.positions([*ids, 0], len(ids))[0]),
        (model.with_routing(weights={"run_x-c0002": 3.0, "run_x-c0000": 1.0}), np.array([0.25, 0, 0.75, 0])),
    ]:
        decoder = MixtureDecoder(view.pool, view.context_router, [ids])
        for token in model.encode(" theorem matrix kernel"):
            np.testing.assert_allclose(decoder.weights[0], expected, atol=1e-9)
            decoder.push([token])


def test_rows_that_branch_go_on_as_if_each_had_been_alone(model: Any) -> None:
    from cbtm._decoder import MixtureDecoder

    contexts = [[EOS_TOKEN_ID, *model.encode(text)] for text in ("river stone", "theorem")]
    decoder = MixtureDecoder(model.pool, model.context_router, contexts)
    decoder.log_probs()
    decoder.push([7, 8])
    decoder.log_probs()
    decoder.reorder([1, 0, 0])
    decoder.push([9, 10, 11])
    found = decoder.log_probs().numpy()
    expected = [[*contexts[1], 8, 9], [*contexts[0], 7, 10], [*contexts[0], 7, 11]]
    assert [list(ids) for ids in decoder.contexts] == expected
    for row, ids in enumerate(expected):
        np.testing.assert_allclose(found[row], brute_force_log_probs(model, ids, top_k=2), atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_come_and_go_in_a_batch_catch_up_on_what_they_missed(model: Any, top_k: int) -> None:
    from cbtm._decoder import MixtureDecoder

    view = with_k(model, top_k)
    texts = ["river", "xyzzy theorem", "court of the silver garden"]
    after = [model.encode(" " + " ".join(random_texts(2, seed=seed, words=(9, 14))))[:40] for seed in (43, 47, 53)]
    contexts = [[EOS_TOKEN_ID, *model.encode(text)] for text in texts]
    decoder = MixtureDecoder(view.pool, view.context_router, contexts)
    in_use = set()
    for tokens in zip(*after, strict=True):
        found = decoder.log_probs().numpy()
        in_use.add(tuple(map(tuple, (decoder.weights > 0).tolist())))
        for row, ids in enumerate(decoder.contexts):
            np.testing.assert_allclose(found[row], brute_force_log_probs(view, ids, top_k=top_k), atol=1e-5)
        decoder.push(tokens)
    assert len(in_use) > 1, "the texts must change their experts on the way"


def test_caches_hold_up_when_every_row_changes_its_experts_at_every_token(model: Any) -> None:
    import torch

    from cbtm._decoder import MixtureDecoder
    from cbtm._routing import ContextRouter

    rng = np.random.default_rng(3)

    class Restless(ContextRouter):
        """Any one or two experts, for any row, at any step."""

        def weights(self, states: Any) -> Any:
            rows = np.zeros((len(states), 4))
            for row in rows:
                row[rng.choice(4, size=int(rng.integers(1, 3)), replace=False)] = rng.uniform(0.1, 1.0)
            return rows / rows.sum(axis=1, keepdims=True)

    def expected(ids: Any, weights: Any) -> Any:
        logits = [model.pool.get(j)(input_ids=torch.tensor([list(ids)])).logits[0, -1].double() for j in range(4)]
        return np.log(sum(w * torch.softmax(x, -1).numpy() for w, x in zip(weights, logits, strict=True)))

    router = Restless(model.context_router.router, model.context_router.detokenizer, model.routing)
    contexts = [rng.integers(1, 300, size=int(length)).tolist() for length in (1, 9, 4, 4, 2)]
    decoder = MixtureDecoder(model.pool, router, contexts)
    for step in range(24):
        found, weights = decoder.log_probs().numpy(), decoder.weights
        for row, ids in enumerate(decoder.contexts):
            np.testing.assert_allclose(found[row], expected(ids, weights[row]), atol=1e-5)
        decoder.push(rng.integers(1, 300, size=len(found)).tolist())
        if step in (8, 16):
            decoder.reorder([3, 1, 1, 0])


def test_each_expert_runs_once_a_step_on_just_the_rows_that_use_it(parts: Any) -> None:
    from cbtm._decoder import MixtureDecoder

    view = with_k(build(parts), 1)
    texts = ["river", "xyzzy theorem", "court of the silver garden", "matrix"]
    after = [view.encode(" " + " ".join(random_texts(2, seed=seed, words=(9, 14))))[:30] for seed in (43, 47, 53, 59)]
    decoder = MixtureDecoder(view.pool, view.context_router, [[EOS_TOKEN_ID, *view.encode(text)] for text in texts])
    calls: list[tuple[int, tuple[int, ...]]] = []
    for index in range(4):
        view.pool.get(index).register_forward_pre_hook(
            lambda _, __, options, index=index: calls.append((index, tuple(options["input_ids"].shape))),
            with_kwargs=True,
        )
    caught_up = 0
    for tokens in zip(*after, strict=True):
        calls.clear()
        decoder.log_probs()
        rows = (decoder.weights > 0).sum(axis=0)
        assert [index for index, _ in sorted(calls)] == np.flatnonzero(rows).tolist()
        for index, shape in calls:
            assert shape[0] == rows[index]
            caught_up += shape[0] > 1 and shape[1] > 1
        decoder.push(tokens)
    assert caught_up > 2, "an expert must catch up beside rows that it was reading"


def test_a_row_that_lags_far_behind_many_is_read_apart_from_them() -> None:
    from cbtm._expert_cache import _groups

    assert _groups({0: 1, 1: 40, 2: 3}) == [[0, 1, 2]]
    lags = {0: 1, 1: 900, 2: 1, 3: 800, 4: 2}
    assert _groups(lags) == [[1, 3], [0, 2, 4]]


def test_experts_and_clusters_in_another_order_on_disk_give_the_same(model: Any, tmp_path: Path) -> None:
    import json

    from cbtm import Ensemble

    texts = random_texts(3, seed=67)
    model.save(tmp_path / "saved")
    manifest = tmp_path / "saved/cbtm.json"
    about = json.loads(manifest.read_text())
    # Folders are renamed among themselves, and the manifest lists clusters backwards.
    names = [entry["expert"] for entry in about["clusters"]]
    moved = dict(zip(names, [*names[2:], *names[:2]], strict=True))
    for name in names:
        (tmp_path / "saved" / name).rename(tmp_path / "saved" / f"{name}.old")
    for name in names:
        (tmp_path / "saved" / f"{name}.old").rename(tmp_path / "saved" / moved[name])
    for entry in about["clusters"]:
        entry["expert"] = moved[entry["expert"]]
    about["clusters"].reverse()
    about["files"] = {
        next((path.replace(old, new, 1) for old, new in moved.items() if path.startswith(old + "/")), path): spec
        for path, spec in about["files"].items()
    }
    manifest.write_text(json.dumps(about))
    again = Ensemble.load(tmp_path / "saved")
    assert again.clusters == model.clusters
    assert again.perplexity(texts) == model.perplexity(texts)
    assert again.generate(texts, max_new_tokens=6) == model.generate(texts, max_new_tokens=6)


def test_a_router_of_another_kind_routes_scoring_and_generation_alike(parts: Any, tmp_path: Path) -> None:
    import dataclasses

    from cbtm import Ensemble, InvalidArgument
    from tests.support.routers import LinearRouter

    router = LinearRouter.random([cluster.id for cluster in reversed(parts.clusters)])
    other = build(dataclasses.replace(parts, router=router))
    texts = random_texts(4, seed=71, words=(2, 5))
    for text, generation in zip(texts, other.generate(texts, max_new_tokens=6), strict=True):
        assert list(generation.token_ids) == greedy_by_brute_force(other, text, top_k=2, tokens=6)
    other.save(tmp_path / "saved")
    assert Ensemble.load(tmp_path / "saved").score(texts) == other.score(texts)
    with pytest.raises(InvalidArgument, match="distance: a linear router has none"):
        other.with_routing(distance="quartic").score("river")


def test_routing_of_one_generation_is_of_that_alone(model: Any) -> None:
    found = model.generate("river stone", max_new_tokens=8, routing={"top_k": 1, "policy": "prompt"})
    assert found == model.with_routing(top_k=1, policy="prompt").generate("river stone", max_new_tokens=8)


def test_sampling_repeats_with_its_seed_and_stays_within_its_bounds(model: Any) -> None:
    prompts = random_texts(2, seed=37, words=(1, 3))
    options = {"max_new_tokens": 12, "temperature": 1.0}
    assert model.generate(prompts, **options, seed=3) == model.generate(prompts, **options, seed=3)
    assert model.generate(prompts, **options, seed=3) != model.generate(prompts, **options, seed=4)
    greedy = model.generate(prompts, max_new_tokens=12)
    assert model.generate(prompts, **options, top_k_tokens=1) == greedy
    assert model.generate(prompts, **options, top_p=1e-6) == greedy


def test_a_text_ends_before_its_stop_string_and_is_told_as_it_comes(model: Any) -> None:
    plain = model.generate("river", max_new_tokens=12)
    stop = plain.completion[3:5]
    pieces: list[str] = []
    stopped = model.generate("river", max_new_tokens=12, stop=stop, on_text=lambda _, piece: pieces.append(piece))
    assert stopped.finish_reason == "stop"
    assert stopped.completion == plain.completion[: plain.completion.index(stop)]
    assert "".join(pieces).startswith(stopped.completion)


def test_an_evaluation_agrees_with_scoring_each_mixture(model: Any) -> None:
    from cbtm import evaluate

    texts = random_texts(10, seed=41)
    found = evaluate(model, texts, top_k=[1, 2])
    for name, top_k in [("top1", 1), ("top2", 2), ("all", None)]:
        assert found.perplexity[name] == pytest.approx(with_k(model, top_k).perplexity(texts).perplexity, rel=1e-5)
    assert set(found.perplexity) == {"seed", "expert", "top1", "top2", "all"}
    share = model.perplexity(texts).expert_share
    assert found.expert_share == pytest.approx(share)
    assert sum(c.documents for c in found.clusters) == len(texts)
    for cluster in found.clusters:
        own = [
            t
            for t in texts
            if model.parts.router.cluster_ids[int(model.parts.router.assign([t])[0])] == cluster.cluster_id
        ]
        alone = model.with_routing(weights={cluster.cluster_id: 1.0}).perplexity(own)
        assert cluster.perplexity["expert"] == pytest.approx(alone.perplexity, rel=1e-5)
    assert found.to_dict()["perplexity"]["top2"] == found.perplexity["top2"]
