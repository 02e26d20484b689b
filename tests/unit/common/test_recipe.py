"""A recipe is checked when it is read, and its canonical JSON is its identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_common.recipe import Precision, Recipe


def _read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, "utf-8")
    return Recipe.from_toml(path)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert _read(tmp_path, "") == Recipe()


def test_a_recipe_survives_its_canonical_json() -> None:
    recipe = Recipe(steps=7, dropout=0.1, precision=Precision.FP32)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).to_json() == recipe.to_json()


def test_the_order_of_fields_in_a_file_makes_no_difference(tmp_path: Path) -> None:
    one = _read(tmp_path, "steps = 5\nseed = 2\n[optimizer]\nbeta1 = 0.8\nlearning_rate = 1e-3\n")
    other = _read(tmp_path, "seed = 2\nsteps = 5\n[optimizer]\nlearning_rate = 0.001\nbeta1 = 0.8\n")
    assert one.to_json() == other.to_json()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("steps = 0", "steps"),
        ("steps = 'many'", "steps"),
        ("stepz = 5", "stepz"),
        ("seed = -1", "seed"),
        ("held_out_fraction = 0.0", "held_out_fraction"),
        ("precision = 'fp8'", "precision"),
        ("[optimizer]\nlearning_rate = 0", "optimizer.learning_rate"),
        ("[optimizer]\nbeta2 = 1.0", "optimizer.beta2"),
        ("[schedule]\ndecay = 'wobble'", "schedule.decay"),
        ("[seed_phase]\nfraction = 1.0", "seed_phase.fraction"),
        ("[lease]\nlease_seconds = 10\nrenew_seconds = 6", "lease"),
        ("[routing]\ntop_k = 0", "routing.top_k"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, text: str, field: str) -> None:
    with pytest.raises(InvalidArgument, match=r"recipe\.toml") as caught:
        _read(tmp_path, text)
    assert caught.value.field == field
    assert field in caught.value.message


def test_a_file_that_is_not_there_or_not_toml_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="there is no file"):
        Recipe.from_toml(tmp_path / "none.toml")
    with pytest.raises(InvalidArgument, match="is not TOML"):
        _read(tmp_path, "steps = ")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(InvalidArgument, match="is not TOML"):
        Recipe.from_toml(tmp_path / "latin.toml")


@pytest.mark.parametrize("text", ["{", "", "[]", "5", "null", '{"steps": NaN}', '{"steps": 1e400}'])
def test_json_that_is_no_recipe_is_an_argument_error(text: str) -> None:
    with pytest.raises(InvalidArgument, match="recipe"):
        Recipe.from_json(text)


@pytest.mark.parametrize(("fraction", "clusters", "steps"), [(0.0, 8, 0), (0.5, 8, 80), (0.2, 4, 10), (0.75, 1, 30)])
def test_the_seed_phase_takes_its_share_of_all_steps(fraction: float, clusters: int, steps: int) -> None:
    recipe = Recipe.from_json(f'{{"steps": 10, "seed_phase": {{"fraction": {fraction}}}}}')
    assert recipe.seed_steps(clusters) == steps
    assert steps == pytest.approx(fraction * (steps + 10 * clusters))


def test_a_seed_phase_with_a_batch_of_its_own_takes_its_share_of_all_tokens() -> None:
    recipe = Recipe.from_json(
        """{"sequence_length": 8, "global_batch": 2, "steps": 12, "optimizer": {"learning_rate": 0.1},
        "seed_phase": {"fraction": 0.75, "global_batch": 6, "learning_rate": 0.3, "warmup_steps": 5}}"""
    )
    assert recipe.seed_steps(4) == 48
    assert (recipe.step_tokens(), recipe.for_seed().step_tokens()) == (16, 48)
    assert recipe.budget_tokens(4, from_scratch=True) == 48 * 48 + 12 * 4 * 16
    dense, steps = recipe.dense_beside(4, from_scratch=True)
    assert steps * dense.step_tokens() == recipe.budget_tokens(4, from_scratch=True)
    assert (dense.global_batch, dense.optimizer.learning_rate, dense.schedule.warmup_steps) == (6, 0.3, 5)
    assert recipe.dense_beside(4, from_scratch=False) == (recipe, 48)


@pytest.mark.parametrize("text", ["[optimizer]\nlearning_rate = inf", "[optimizer]\ngradient_clip = nan"])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match="optimizer"):
        _read(tmp_path, text)
