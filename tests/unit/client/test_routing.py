from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cbtm._routing import ContextRouter, Policy, RoutingOptions, fixed_weights, single_router
from cbtm._text import TextState
from cbtm_common.errors import InvalidArgument
from tests.support.ensembles import WORDS, learned_router, random_router

IDS = ["c0", "c1", "c2", "c3"]


class Letters:
    """Token n is character n; token 0 is special."""

    def push(self, state: TextState, token: int) -> tuple[TextState, str]:
        return state, chr(token) if token else ""


def router_of(**options: object) -> ContextRouter:
    return ContextRouter(random_router(IDS), Letters(), RoutingOptions(**options))  # type: ignore[arg-type]


def seeded(**options: object) -> ContextRouter:
    return ContextRouter(random_router(IDS), Letters(), RoutingOptions(**options), seed=True)  # type: ignore[arg-type]


def tokens(text: str) -> list[int]:
    return [0, *map(ord, text)]


TEXTS = [" ".join(WORDS[i : i + 4]) + "." for i in range(0, len(WORDS), 4)]


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_each_position_has_the_weights_of_all_the_text_before_it(top_k: int | None) -> None:
    router = router_of(top_k=top_k)
    for text in TEXTS:
        ids = tokens(text)
        found = router.positions(ids, 1)
        assert found.shape == (len(text), 4)
        for t in range(1, len(ids)):
            expected = router.router.weights([text[: t - 1]], top_k=top_k, temperature=0.1)[0]
            np.testing.assert_allclose(found[t - 1], expected, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_a_growing_context_has_the_weights_of_its_position(top_k: int | None) -> None:
    router = router_of(top_k=top_k)
    for text in TEXTS:
        ids = tokens(text)
        expected = router.positions([*ids, 0], 1)
        state = router.start(ids[:1])
        for t, token in enumerate(ids[1:], 1):
            np.testing.assert_allclose(router.weights([state])[0], expected[t - 1], atol=1e-9)
            state = router.push(state, token)


@pytest.mark.parametrize(("interval", "settle_after"), [(4, None), (1, 6), (5, 13), (3, 2)])
def test_weights_that_change_less_often_are_those_of_an_earlier_prefix(interval: int, settle_after: int | None) -> None:
    router, often = router_of(interval=interval, settle_after=settle_after), router_of()
    for text in TEXTS:
        ids = tokens(text)
        every = often.positions([*ids, 0], 1)
        found = router.positions([*ids, 0], 1)
        state = router.start(ids[:1])
        for length in range(1, len(ids) + 1):
            seen = min(length, settle_after or length)
            routed = seen if seen < interval else seen // interval * interval
            np.testing.assert_allclose(found[length - 1], every[routed - 1], atol=1e-9)
            np.testing.assert_allclose(router.weights([state])[0], every[routed - 1], atol=1e-9)
            np.testing.assert_allclose(router.weights([router.start(ids[:length])])[0], every[routed - 1], atol=1e-9)
            if length < len(ids):
                state = router.push(state, ids[length])


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_the_seed_has_all_the_weight_where_no_cluster_has_enough(top_k: int | None) -> None:
    router, plain = seeded(top_k=top_k, seed_below=0.9), router_of(top_k=top_k)
    assert (router.columns, plain.columns) == (5, 4)
    stood_in = []
    for text in TEXTS:
        ids = tokens(text)
        found, expected = router.positions(ids, 1), plain.positions(ids, 1)
        all_of_it = router_of(top_k=None).positions(ids, 1)
        state = router.start(ids[:1])
        for t in range(len(text)):
            far = all_of_it[t].max() < 0.9
            stood_in.append(far)
            wanted = [0.0] * 4 + [1.0] if far else [*expected[t], 0.0]
            np.testing.assert_allclose(found[t], wanted, atol=1e-9)
            np.testing.assert_allclose(router.weights([state])[0], wanted, atol=1e-9)
            state = router.push(state, ids[t + 1])
        np.testing.assert_allclose(router.text_weights([text])[0], router.weights([state])[0], atol=1e-9)
    assert 0 < sum(stood_in) < len(stood_in)


def test_the_seed_stands_in_for_a_prompt_as_a_whole_and_never_for_fixed_weights() -> None:
    router = seeded(policy=Policy.PROMPT, top_k=1, seed_below=0.9)
    unknown = tokens("xyzzy river")
    assert router.positions(unknown, 7)[:, 4].tolist() == [1.0] * 5
    state = router.start(unknown[:7])
    for token in unknown[7:]:
        state = router.push(state, token)
    assert router.weights([state]).tolist() == [[0, 0, 0, 0, 1]]
    fixed = router.with_options({"weights": [1, 1, 2, 0]})
    assert fixed.text_weights(["xyzzy"]).tolist() == [[0, 0, 1, 0, 0]]
    assert fixed.weights([fixed.start(unknown)]).tolist() == [[0, 0, 1, 0, 0]]


def test_the_seed_is_left_out_by_name_and_asked_for_only_where_there_is_one() -> None:
    assert seeded(seed_below=0.5).with_options({"seed_below": "never"}).columns == 4
    assert seeded(seed_below=0.5).with_options({"top_k": 1}).options.seed_below == 0.5
    with pytest.raises(InvalidArgument, match="seed_below: this ensemble has no seed model"):
        router_of().with_options({"seed_below": 0.5})


def test_settling_is_undone_by_name() -> None:
    router = router_of(settle_after=2).with_options({"interval": 8})
    assert (router.options.interval, router.options.settle_after) == (8, 2)
    assert router.with_options({"settle_after": "never"}).options.settle_after is None


@pytest.mark.parametrize("kind", ["centroid", "learned"])
def test_a_context_without_a_known_term_has_the_prior_at_the_first_token_as_later(kind: str) -> None:
    clustering = random_router(IDS)
    router = ContextRouter(
        clustering if kind == "centroid" else learned_router(clustering), Letters(), RoutingOptions(top_k=None)
    )
    for ids in ([0], tokens("xyzzy the of 42")):
        np.testing.assert_allclose(router.weights([router.start(ids)])[0], clustering.prior, atol=1e-6)
        np.testing.assert_allclose(router.positions([*ids, 0], 1), [clustering.prior] * len(ids), atol=1e-6)


def test_the_prompt_policy_routes_on_the_prompt_alone() -> None:
    router = router_of(policy=Policy.PROMPT, top_k=2)
    ids = tokens("river stone theorem matrix")
    expected = router.router.weights(["river stone"], top_k=2, temperature=0.1)[0]
    found = router.positions(ids, len("river stone") + 1)
    np.testing.assert_allclose(found, np.repeat(expected[None], len(found), axis=0), atol=1e-6)
    state = router.start(tokens("river stone"))
    np.testing.assert_allclose(router.weights([router.push(state, ord("x"))])[0], expected, atol=1e-6)


def test_fixed_weights_are_scaled_cut_to_the_top_k_and_bound_by_id() -> None:
    weights = fixed_weights({"c3": 3.0, "c1": 1.0, "c0": 0.5}, IDS)
    router = router_of(policy=Policy.FIXED, weights=weights, top_k=2)
    np.testing.assert_allclose(router.positions(tokens("ab"), 1), [[0, 0.25, 0, 0.75]] * 2)
    np.testing.assert_allclose(router.text_weights(["any"]), [[0, 0.25, 0, 0.75]])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 5}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"interval": 0}, "interval"),
        ({"settle_after": 0}, "settle_after"),
        ({"seed_below": 0}, "seed_below"),
        ({"seed_below": 1.5}, "seed_below"),
        ({"policy": Policy.FIXED}, "weights"),
        ({"weights": (1.0, 0.0, 0.0, 0.0)}, "weights"),
        ({"policy": Policy.FIXED, "weights": (1.0, 2.0)}, "weights"),
        ({"policy": Policy.FIXED, "weights": (0.0,) * 4}, "weights"),
        ({"policy": Policy.FIXED, "weights": (1.0, -1.0, 1.0, 1.0)}, "weights"),
    ],
)
def test_options_that_make_no_sense_name_their_field(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RoutingOptions(**options).check(4)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_weights_for_a_cluster_that_is_not_there_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no cluster 'c9'"):
        fixed_weights({"c9": 1.0}, IDS)


def test_an_ensemble_of_one_gives_it_everything(tmp_path: object) -> None:
    router = ContextRouter(single_router("only"), Letters(), RoutingOptions(top_k=1))
    np.testing.assert_array_equal(router.positions(tokens("river"), 1), np.ones((5, 1)))


def test_a_restricted_router_divides_the_weight_of_the_others_in_proportion() -> None:
    whole = random_router(IDS)
    part = whole.restrict(["c2", "c0"])
    for text in ["", *TEXTS]:
        full = whole.weights([text])[0]
        np.testing.assert_allclose(part.weights([text])[0], full[[2, 0]] / full[[2, 0]].sum(), atol=1e-6)
    with pytest.raises(InvalidArgument, match="no cluster c7"):
        whole.restrict(["c7"])


def _pieces(text: str, sizes: Sequence[int]) -> list[str]:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return [*parts, text[at:]]


def test_a_running_text_embeds_as_the_whole_however_it_was_cut() -> None:
    embedding = random_router(IDS).embedding
    rng = np.random.default_rng(0)
    for text in TEXTS:
        running = embedding.start()
        for piece in _pieces(text, rng.integers(0, 5, size=8).tolist()):
            running = embedding.advance(running, piece)
        np.testing.assert_allclose(embedding.embed_running([running]), embedding.embed([text]), atol=1e-9)
