"""`CbtmForCausalLM` against brute force, through transformers' own loading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.causal_lm import TOP_K, brute_greedy, load, new_tokens, padded, prompts_of, save_ensemble
from tests.support.ensembles import brute_force_log_probs
from tests.support.models import EOS_TOKEN_ID

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ensemble(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


class TestForward:
    @pytest.mark.parametrize("top_k", TOP_K)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_on_either_side_leaves_every_token_its_log_probabilities(
        self, any_k: Any, top_k: int, side: str
    ) -> None:
        model = any_k(top_k)
        rows = prompts_of(model, 4, seed=3)
        batch = padded(rows, side)
        width = batch["input_ids"].shape[1]
        for options in ({}, {"use_cache": True}):
            logits = model(**batch, **options).logits
            assert logits.shape == (4, width, 300)
            np.testing.assert_allclose(logits.exp().sum(-1).numpy(), 1.0, atol=1e-5)
            for b, row in enumerate(rows):
                expected = model.ensemble.log_probs([row])[0].numpy()
                whole = model.ensemble.log_probs(batch["input_ids"], batch["attention_mask"])
                np.testing.assert_allclose(whole[b].numpy(), logits[b].numpy(), atol=1e-5)
                at = slice(width - len(row), None) if side == "left" else slice(None, len(row))
                np.testing.assert_allclose(logits[b, at].numpy(), expected, atol=1e-5)
                np.testing.assert_allclose(
                    expected[-1], brute_force_log_probs(model.ensemble, row, top_k=top_k), atol=1e-5
                )

    def test_right_padding_without_a_mask_changes_nothing_before_it(self, model: Any) -> None:
        rows = prompts_of(model, 3, seed=4)
        found = model(padded(rows, "right")["input_ids"]).logits
        for b, row in enumerate(rows):
            np.testing.assert_allclose(
                found[b, : len(row)].numpy(), model.ensemble.log_probs([row])[0].numpy(), atol=1e-5
            )

    def test_padding_anywhere_repeats_what_stands_after_the_token_before_it(self, model: Any) -> None:
        import torch

        row = prompts_of(model, 1, seed=5, words=(4, 6))[0]
        spread = torch.tensor([[7, *row[:2], 9, 9, *row[2:], 8]])
        mask = torch.tensor([[0, 1, 1, 0, 0, *[1] * (len(row) - 2), 0]])
        expected = model.ensemble.log_probs([row])[0]
        for options in ({}, {"use_cache": True}):
            found = model(spread, mask, **options).logits[0]
            np.testing.assert_allclose(found[0].exp().numpy(), 1 / 300, rtol=1e-5)
            np.testing.assert_allclose(found[2:5].numpy(), expected[1].expand(3, -1).numpy(), atol=1e-5)
            np.testing.assert_allclose(found[5:-1].numpy(), expected[2:].numpy(), atol=1e-5)
            np.testing.assert_allclose(found[-1].numpy(), expected[-1].numpy(), atol=1e-5)

    def test_logits_to_keep_takes_columns_from_the_end_or_by_place(self, model: Any) -> None:
        import torch

        batch = padded(prompts_of(model, 3, seed=6), "left")
        whole = model(**batch).logits
        for keep in (1, 3, torch.tensor([0, 2])):
            expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
            for options in ({}, {"use_cache": True}):
                found = model(**batch, logits_to_keep=keep, **options).logits
                np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)

    @pytest.mark.parametrize("top_k", TOP_K)
    def test_reading_with_a_cache_in_pieces_of_any_length_gives_the_same(self, any_k: Any, top_k: int) -> None:
        import torch

        model = any_k(top_k)
        rng = np.random.default_rng(7)
        ids = torch.tensor(rng.integers(1, 300, size=(3, 40)))
        whole = model(ids).logits
        cache, at = None, 0
        for width in (1, 7, 1, 2, 12, 1, 16):
            out = model(ids[:, at : at + width], past_key_values=cache, use_cache=True)
            np.testing.assert_allclose(out.logits.numpy(), whole[:, at : at + width].numpy(), atol=2e-5)
            cache, at = out.past_key_values, at + width
            assert cache.get_seq_length() == at

    def test_labels_give_the_mean_negative_log_probability(self, model: Any) -> None:
        batch = padded(prompts_of(model, 3, seed=8), "right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        out = model(**batch, labels=labels)
        log_probs = [
            float(out.logits[b, t, int(labels[b, t + 1])])
            for b in range(3)
            for t in range(labels.shape[1] - 1)
            if labels[b, t + 1] != -100
        ]
        assert float(out.loss) == pytest.approx(-np.mean(log_probs), rel=1e-5)


def test_positions_that_are_learned_are_counted_from_each_rows_first_token(tmp_path: Path) -> None:
    model = load(save_ensemble(tmp_path, "gpt2"))
    rows = prompts_of(model, 4, seed=42)
    batch = padded(rows, "left")
    width = batch["input_ids"].shape[1]
    for options in ({}, {"use_cache": True}):
        logits = model(**batch, **options).logits
        for b, row in enumerate(rows):
            expected = model.ensemble.log_probs([row])[0].numpy()
            np.testing.assert_allclose(logits[b, width - len(row) :].numpy(), expected, atol=1e-5)
    output = model.generate(**batch, max_new_tokens=8, pad_token_id=EOS_TOKEN_ID)
    for row, found in zip(rows, new_tokens(output, width), strict=True):
        assert found == brute_greedy(model, row, top_k=2, tokens=8)


class TestLoading:
    def test_saved_and_loaded_it_is_the_same_and_each_expert_loads_alone(self, folder: Path, tmp_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = load(folder, num_experts_per_tok=3, routing_temperature=0.7)
        model.generation_config.max_new_tokens = 5
        model.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again")
        assert again.config.num_experts_per_tok == 3
        assert again.config.routing_temperature == 0.7
        assert again.generation_config.max_new_tokens == 5
        ids = torch.tensor(prompts_of(model, 1, seed=43))
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == model.ensemble.tokenizer.get_vocab()
        for index in range(4):
            alone = AutoModelForCausalLM.from_pretrained(tmp_path / f"again/experts/{index:04d}")
            expected = model.ensemble.pool.get(index)(ids).logits
            assert torch.equal(alone(ids).logits, expected)
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)

    def test_a_budget_of_one_expert_changes_nothing(self, folder: Path, model: Any) -> None:
        batch = padded(prompts_of(model, 3, seed=47), "left")
        tight = load(folder, max_experts=1)
        options = {"max_new_tokens": 10, "num_beams": 2, "pad_token_id": EOS_TOKEN_ID}
        assert tight.generate(**batch, **options).tolist() == model.generate(**batch, **options).tolist()
        np.testing.assert_allclose(tight(**batch).logits.numpy(), model(**batch).logits.numpy(), atol=1e-6)
        assert len(tight.ensemble.pool.resident) == 1

    def test_dtype_and_device_apply_to_every_expert(self, folder: Path) -> None:
        import torch

        model = load(folder, dtype="bfloat16", device_map={"": "cpu"})
        assert model.dtype == torch.bfloat16
        assert model.device.type == "cpu"
        assert model.ensemble.pool.get(0).dtype == torch.bfloat16
        model.float()
        assert model.ensemble.pool.get(0).dtype == model.ensemble.pool.get(1).dtype == model.dtype == torch.float32
        assert model.num_parameters() == sum(model.ensemble.pool.get(i).num_parameters() for i in range(4))

    def test_an_open_ensemble_is_shared(self, folder: Path, model: Any) -> None:
        import torch

        from cbtm import CbtmForCausalLM, Ensemble

        with Ensemble.load(folder) as ensemble:
            shared = CbtmForCausalLM.from_ensemble(ensemble)
            ids = torch.tensor(prompts_of(model, 1, seed=53))
            assert torch.equal(shared(ids).logits, model(ids).logits)
            assert shared.ensemble.pool is ensemble.pool

    @pytest.mark.parametrize(
        "code",
        [
            "import cbtm; from transformers import AutoConfig, AutoModelForCausalLM; trust = False",
            "from transformers import AutoConfig, AutoModelForCausalLM; import cbtm; trust = None",
            "import transformers, cbtm; from transformers import AutoConfig, AutoModelForCausalLM; trust = None",
            "from transformers import AutoConfig, AutoModelForCausalLM; trust = True",
        ],
    )
    def test_the_auto_classes_know_it_in_a_fresh_process(self, folder: Path, tmp_path: Path, code: str) -> None:
        code += f"""
config = AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=trust)
assert config.model_type == "cbtm" and config.num_experts == 4, config
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=trust, num_experts_per_tok=1)
import cbtm, torch
assert type(model) is cbtm.CbtmForCausalLM and model.ensemble.routing.top_k == 1
assert model.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=2, pad_token_id=0).shape[0] == 1
"""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)


class TestMistakes:
    def test_in_what_is_read(self, model: Any) -> None:
        import torch
        from transformers import DynamicCache

        from cbtm import InvalidArgument

        ids = torch.tensor([[0, 5, 6], [0, 7, 8]])
        with pytest.raises(InvalidArgument, match="row 2 has no token; an empty prompt"):
            model(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))
        with pytest.raises(InvalidArgument, match="input_ids: a shape"):
            model(ids[:, :0])
        with pytest.raises(InvalidArgument, match=r"attention_mask: its shape \[2, 2\] does not fit"):
            model(ids, torch.ones((2, 2)))
        with pytest.raises(InvalidArgument, match="ids are from 0 to 299"):
            model(torch.tensor([[300]]))
        with pytest.raises(InvalidArgument, match="row 1 has 65 tokens, and the experts' context holds 64"):
            model.generate(torch.ones((1, 65), dtype=torch.long), max_new_tokens=2, pad_token_id=0)
        with pytest.raises(InvalidArgument, match="output_attentions: an ensemble has no such"):
            model(ids, output_attentions=True)
        with pytest.raises(InvalidArgument, match="past_key_values: a DynamicCache is not this model's"):
            model(ids, past_key_values=DynamicCache())

    def test_in_how_it_is_loaded(self, folder: Path, tmp_path: Path) -> None:
        from cbtm import AlreadyExists, CbtmConfig, CbtmForCausalLM, InvalidArgument, NotFound

        with pytest.raises(InvalidArgument, match="top_k: 5 is not between 1 and 4"):
            load(folder, num_experts_per_tok=5)
        with pytest.raises(InvalidArgument, match="device: 'cuda:9'"):
            load(folder, device_map="cuda:9")
        with pytest.raises(InvalidArgument, match="experts are not split"):
            load(folder, device_map={"a": "cpu", "b": "cuda:0"})
        with pytest.raises(InvalidArgument, match="load_in_4bit: from_pretrained of an ensemble takes no such option"):
            CbtmForCausalLM.from_pretrained(folder, load_in_4bit=True)
        with pytest.raises(InvalidArgument, match="a config has no experts"):
            CbtmForCausalLM(CbtmConfig())
        with pytest.raises(NotFound, match="no repository"):
            CbtmForCausalLM.from_pretrained(str(tmp_path / "nowhere"))
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(AlreadyExists):
            load(folder).save_pretrained(tmp_path)
