"""`CbtmForCausalLM` in transformers' own generation, against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.causal_lm import CONTEXT, TOP_K, brute_greedy, load, new_tokens, padded, prompts_of, save_ensemble
from tests.support.ensembles import random_texts
from tests.support.models import EOS_TOKEN_ID

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ensemble(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


class TestGenerate:
    @pytest.mark.parametrize("top_k", TOP_K)
    def test_greedy_in_a_left_padded_batch_equals_brute_force_of_each_row(self, any_k: Any, top_k: int) -> None:
        model = any_k(top_k)
        rows = prompts_of(model, 100, seed=11, words=(1, 4))
        batch = padded(rows, "left")
        output = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=EOS_TOKEN_ID)
        width = batch["input_ids"].shape[1]
        assert output[:, :width].tolist() == batch["input_ids"].tolist()
        for row, found in zip(rows, new_tokens(output, width), strict=True):
            assert found == brute_greedy(model, row, top_k=top_k, tokens=6)

    def test_greedy_equals_the_ensembles_own_generation(self, model: Any) -> None:
        for text in random_texts(4, seed=12):
            ids = [EOS_TOKEN_ID, *model.ensemble.encode(text)]
            output = model.generate(**padded([ids], "left"), max_new_tokens=20, pad_token_id=EOS_TOKEN_ID)
            found = [i for i in new_tokens(output, len(ids))[0] if i != EOS_TOKEN_ID]
            assert found == list(model.ensemble.generate(text, max_new_tokens=20).token_ids)

    def test_without_a_cache_the_text_is_the_same(self, model: Any) -> None:
        batch = padded(prompts_of(model, 3, seed=13), "left")
        options = {"max_new_tokens": 10, "pad_token_id": EOS_TOKEN_ID}
        assert (
            model.generate(**batch, **options).tolist() == model.generate(**batch, **options, use_cache=False).tolist()
        )

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_beam_search_equals_beam_search_without_a_cache_and_scores_what_it_finds(
        self, any_k: Any, top_k: int
    ) -> None:
        model = any_k(top_k)
        rows = prompts_of(model, 3, seed=17)
        batch = padded(rows, "left")
        options: dict[str, Any] = {
            "max_new_tokens": 10,
            "num_beams": 3,
            "num_return_sequences": 2,
            "length_penalty": 0.0,
            "pad_token_id": EOS_TOKEN_ID,
            "output_scores": True,
            "return_dict_in_generate": True,
        }
        found, plain = model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False)
        assert found.sequences.tolist() == plain.sequences.tolist()
        for n, added in enumerate(new_tokens(found.sequences, batch["input_ids"].shape[1])):
            ids = rows[n // 2]
            log_probs = model.ensemble.log_probs([[*ids, *added]])[0]
            total = sum(float(log_probs[len(ids) - 1 + i, token]) for i, token in enumerate(added))
            assert float(found.sequences_scores[n]) == pytest.approx(total, abs=1e-4)

    def test_sampling_repeats_with_its_seed(self, model: Any) -> None:
        import torch

        batch = padded(prompts_of(model, 2, seed=19), "left")
        draws = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            draws.append(
                model.generate(
                    **batch, do_sample=True, top_p=0.9, temperature=0.8, max_new_tokens=12, num_return_sequences=3
                ).tolist()
            )
        assert draws[0] == draws[1] != draws[2]

    def test_a_streamer_and_stop_strings_and_criteria_are_heeded(self, model: Any) -> None:
        from transformers import StoppingCriteria
        from transformers.generation.streamers import BaseStreamer

        class Collect(BaseStreamer):
            def __init__(self) -> None:
                self.pieces: list[list[int]] = []
                self.ended = False

            def put(self, value: Any) -> None:
                self.pieces.append(value.reshape(-1).tolist())

            def end(self) -> None:
                self.ended = True

        class AfterThree(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
                import torch

                return torch.full((len(input_ids),), input_ids.shape[1] >= width + 3)

        batch = padded(prompts_of(model, 1, seed=23), "left")
        width = batch["input_ids"].shape[1]
        streamer = Collect()
        plain = model.generate(**batch, max_new_tokens=12, streamer=streamer, pad_token_id=EOS_TOKEN_ID)
        assert streamer.ended
        assert [i for piece in streamer.pieces for i in piece] == plain[0].tolist()
        short = model.generate(**batch, max_new_tokens=12, stopping_criteria=[AfterThree()], pad_token_id=EOS_TOKEN_ID)
        assert short.tolist() == plain[:, : width + 3].tolist()
        tokenizer = model.ensemble.tokenizer
        texts = [tokenizer.decode([i]) for i in plain[0, width:].tolist()]
        place = next(n for n, text in enumerate(texts) if n > 1 and text.strip() and text.isascii())
        stopped = model.generate(
            **batch, max_new_tokens=12, stop_strings=[texts[place]], tokenizer=tokenizer, pad_token_id=EOS_TOKEN_ID
        )
        assert stopped.shape[1] <= width + place + 1
        assert tokenizer.decode(stopped[0, width:]).endswith(texts[place])

    def test_generation_goes_on_from_the_cache_that_it_returned(self, model: Any) -> None:
        import torch

        batch = padded(prompts_of(model, 1, seed=29), "left")
        options = {"pad_token_id": EOS_TOKEN_ID, "eos_token_id": None}
        whole = model.generate(**batch, max_new_tokens=12, **options)
        first = model.generate(**batch, max_new_tokens=5, return_dict_in_generate=True, **options)
        rest = model.generate(
            first.sequences,
            attention_mask=torch.ones_like(first.sequences),
            past_key_values=first.past_key_values,
            max_new_tokens=7,
            **options,
        )
        assert rest.tolist() == whole.tolist()

    def test_prompt_lookup_which_takes_tokens_back_gives_the_same(self, model: Any) -> None:
        ids = prompts_of(model, 1, seed=31, words=(3, 4))[0][:16]
        batch = padded([ids + ids[1:]], "left")
        options = {"max_new_tokens": 16, "pad_token_id": EOS_TOKEN_ID}
        found = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
        assert found.tolist() == model.generate(**batch, **options).tolist()

    def test_it_ends_when_the_longest_row_fills_the_context(self, model: Any) -> None:
        rows = prompts_of(model, 2, seed=37)
        output = model.generate(
            **padded(rows, "left"), max_new_tokens=200, pad_token_id=EOS_TOKEN_ID, eos_token_id=None
        )
        assert output.shape[1] == CONTEXT

    def test_routing_of_one_call_is_of_that_call_alone(self, model: Any) -> None:
        import torch

        batch = padded(prompts_of(model, 3, seed=59), "left")
        options = {"max_new_tokens": 8, "pad_token_id": EOS_TOKEN_ID}
        before = (model.generate(**batch, **options).tolist(), model.config.to_dict(), model.ensemble.routing)
        for change in (
            {"top_k": 1},
            {"top_k": "all", "temperature": 3.0},
            {"policy": "prompt"},
            {"weights": {"run_x-c0002": 1.0}},
            {"policy": "fixed", "weights": [0.0, 0.5, 0.5, 0.0]},
            {"distance": "quartic", "top_k": 3},
        ):
            model.set_routing(**change)
            expected = model.generate(**batch, **options).tolist()
            logits = None if change.get("policy") == "prompt" else model(**batch).logits
            again = {"weights": None, "policy": "prefix", "top_k": 2, "temperature": 0.3, "distance": "squared"}
            model.set_routing(**again)
            assert model.generate(**batch, **options, routing=change).tolist() == expected
            beams = model.generate(**batch, **options, num_beams=2, routing=change)
            assert beams.shape[0] == 3
            if logits is not None:
                assert torch.equal(model(**batch, routing=change).logits, logits)
        assert (model.generate(**batch, **options).tolist(), model.config.to_dict(), model.ensemble.routing) == before

    def test_a_cache_keeps_the_routing_that_it_began_with(self, model: Any) -> None:
        import torch

        from cbtm import InvalidArgument

        ids = torch.tensor(prompts_of(model, 1, seed=61))
        cache = model(ids, use_cache=True, routing={"top_k": 1}).past_key_values
        more = torch.tensor([[7]])
        both = torch.cat([ids, more], dim=1)
        found = model(more, past_key_values=cache).logits[0, -1]
        np.testing.assert_allclose(found.numpy(), model(both, routing={"top_k": 1}).logits[0, -1].numpy(), atol=1e-5)
        with pytest.raises(InvalidArgument, match="routing: past_key_values was made with another"):
            model(more, past_key_values=cache, routing={"top_k": 2})
        with pytest.raises(InvalidArgument, match="top_k: 5 is not between 1 and 4"):
            model.generate(ids, max_new_tokens=2, pad_token_id=0, routing={"top_k": 5})
        with pytest.raises(InvalidArgument, match="routing: 'topk' is not one of"):
            model(ids, routing={"topk": 1})

    def test_routing_once_on_the_prompt(self, model: Any) -> None:
        ids = prompts_of(model, 1, seed=41)[0]
        weights = model.ensemble.context_router.positions([*ids, 0], len(ids))[0]
        batch = padded([ids], "left")
        options = {"max_new_tokens": 8, "pad_token_id": EOS_TOKEN_ID}
        model.set_routing(policy="prompt")
        found = model.generate(**batch, **options)
        model.set_routing(policy="fixed", weights=weights.tolist())
        fixed = model.generate(**batch, **options)
        model.set_routing(policy="prefix")
        assert found.tolist() == fixed.tolist()
