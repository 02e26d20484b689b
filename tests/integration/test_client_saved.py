"""Ensembles in folders: they give the numbers of what was saved, and are mixed as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import brute_force_log_probs, build, greedy_by_brute_force, learned_router, random_texts
from tests.support.models import EOS_TOKEN_ID

pytestmark = pytest.mark.integration


def test_a_saved_ensemble_gives_the_same_numbers_from_its_folder_alone(model: Any, tmp_path: Path) -> None:
    from cbtm import Ensemble

    texts = random_texts(3, seed=31)
    model.save(tmp_path / "saved")
    again = Ensemble.load(tmp_path / "saved")
    assert again.routing == model.routing
    assert again.clusters == model.clusters
    assert again.route(texts) == model.route(texts)
    assert again.generate(texts, max_new_tokens=6) == model.generate(texts, max_new_tokens=6)
    assert again.perplexity(texts) == model.perplexity(texts)


def test_every_expert_of_a_saved_ensemble_loads_alone(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save(tmp_path / "saved")
    for place in ["experts/0000", "experts/0003", "seed"]:
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / place)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "routing",
    [
        {"top_k": 1, "temperature": 0.7},
        {"top_k": "all", "distance": "quartic"},
        {"policy": "prompt"},
        {"weights": [0.0, 1.0, 3.0, 0.0]},
        {"interval": 2, "settle_after": 5},
    ],
    ids=lambda routing: "-".join(routing),
)
def test_a_saved_ensemble_is_mixed_as_it_was(model: Any, tmp_path: Path, routing: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from cbtm import Ensemble

    view = model.with_routing(**routing)
    view.save(tmp_path / "ensemble")
    loaded = Ensemble.load(tmp_path / "ensemble")
    wanted = view.score("stone window", prompts="river harbor")
    assert loaded.score("stone window", prompts="river harbor") == wanted
    assert loaded.generate("river", max_new_tokens=4) == view.generate("river", max_new_tokens=4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ensemble")
    again.save_pretrained(tmp_path / "again")
    assert Ensemble.load(tmp_path / "again").score("stone window", prompts="river harbor") == wanted
    # What is asked for comes first.
    assert Ensemble.load(tmp_path / "ensemble", top_k=2, temperature=0.2).routing.temperature == 0.2


def test_a_learned_router_weighs_by_token_and_is_saved_with_the_ensemble(parts: Any, tmp_path: Path) -> None:
    from cbtm import Ensemble

    model = build(replace(parts, router=learned_router(parts.router)))
    ids = [EOS_TOKEN_ID, *model.encode("river harbor stone window")]
    found = model.with_routing(top_k=2).log_probs([ids]).numpy()[0]
    for t in range(len(ids)):
        np.testing.assert_allclose(found[t], brute_force_log_probs(model, ids[: t + 1], top_k=2), atol=1e-5)
    prompt = "stone window"
    generated = model.with_routing(top_k=1).generate(prompt, max_new_tokens=5)
    assert list(generated.token_ids) == greedy_by_brute_force(model, prompt, top_k=1, tokens=5)
    model.save(tmp_path / "ensemble")
    assert Ensemble.load(tmp_path / "ensemble").score("stone window") == model.score("stone window")
