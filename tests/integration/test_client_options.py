"""Every option of `generate` with an ensemble of one expert: the same tokens as transformers gives for that expert.

Logits of an ensemble are log-probabilities, so the plain model's are made so as well: a penalty that scales scores
(`repetition_penalty`) acts on them, as it does in transformers' own beam search.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import make_parts, random_texts
from tests.support.models import EOS_TOKEN_ID, make_tiny_model

pytestmark = pytest.mark.integration

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.6},
    "top_k": {"do_sample": True, "top_k": 7},
    "top_p": {"do_sample": True, "top_p": 0.7},
    "min_p": {"do_sample": True, "min_p": 0.2},
    "typical_p": {"do_sample": True, "typical_p": 0.6},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.003},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.003},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "length penalty": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 8},
    "min_length": {"min_length": 20},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7], [250]]},
    "sequence_bias": {"sequence_bias": [[[9], 3.0], [[9, 11], -4.0]]},
    "suppress_tokens": {"suppress_tokens": list(range(1, 100))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(1, 150))},
    "forced_eos_token_id": {"forced_eos_token_id": 4},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [3 * row + 5, int(ids[-1]) // 2, 8]},
    "renormalize_logits": {"renormalize_logits": True, "do_sample": True, "top_k": 20},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.4, "bias": 3.0}},
    "no cache": {"use_cache": False},
}
# One row at a time: takes tokens back.
ASSISTED: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
    "sampling with an assistant": {"assistant_model": True, "do_sample": True},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(ensemble of one, its expert with log-probabilities for logits, a smaller model of the same vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM

    from cbtm import CbtmForCausalLM
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("one")
    parts = make_parts(root, experts=1)
    ensemble = CbtmForCausalLM.from_ensemble(Ensemble._of(parts, Placement(), top_k=1, temperature=None))
    plain = AutoModelForCausalLM.from_pretrained(root / "model0")

    def as_log_probs(_: Any, __: Any, output: Any) -> Any:
        output.logits = torch.log_softmax(output.logits, dim=-1)
        return output

    plain.register_forward_hook(as_log_probs)
    small = make_tiny_model(root / "small", vocab_size=300, seed=5, hidden_size=8, layers=1, context=64)
    return ensemble, plain, AutoModelForCausalLM.from_pretrained(small)


def run(model: Any, batch: dict[str, Any], options: dict[str, Any]) -> list[list[int]]:
    import torch

    torch.manual_seed(11)
    options = {"max_new_tokens": 10, "pad_token_id": EOS_TOKEN_ID, **options}
    found: list[list[int]] = model.generate(**batch, **options).tolist()
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_a_standard_option_gives_what_transformers_gives(pair: Any, name: str) -> None:
    import torch

    ensemble, plain, _ = pair
    texts = random_texts(3, seed=7, words=(2, 5))
    rows = [[EOS_TOKEN_ID, *ensemble.ensemble.encode(text)] for text in texts]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[EOS_TOKEN_ID] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    if name == "guidance_scale":
        # Its model without a prompt starts from the last column alone, unmasked: padding has no part in it.
        batch = {key: value[[int(np.argmax([len(row) for row in rows]))]] for key, value in batch.items()}
    assert run(ensemble, batch, OPTIONS[name]) == run(plain, batch, OPTIONS[name])


@pytest.mark.parametrize("name", ASSISTED)
def test_assisted_decoding_gives_what_transformers_gives(pair: Any, name: str) -> None:
    import torch

    ensemble, plain, small = pair
    ids = [EOS_TOKEN_ID, *ensemble.ensemble.encode("river stone river")]
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones((1, len(ids)), dtype=torch.long)}
    options = {**ASSISTED[name], **({"assistant_model": small} if "assistant_model" in ASSISTED[name] else {})}
    assert run(ensemble, batch, options) == run(plain, batch, options)
    if not options.get("do_sample"):
        assert run(ensemble, batch, options) == run(ensemble, batch, {})


def test_what_an_ensemble_cannot_do_is_refused_by_name(pair: Any) -> None:
    import torch

    from cbtm import InvalidArgument

    ensemble, _, _ = pair
    ids = torch.tensor([[0, 5, 6]])
    for options in (
        {"inputs_embeds": torch.zeros((1, 3, 16))},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"past_key_values": ((torch.zeros(1),),)},
        {"cache_implementation": "static"},
    ):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            ensemble.generate(ids, max_new_tokens=2, pad_token_id=0, **options)
    with pytest.raises(InvalidArgument, match="inputs_embeds"):
        ensemble.generate(inputs_embeds=torch.zeros((1, 3, 16)), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(InvalidArgument, match="resize_token_embeddings"):
        ensemble.resize_token_embeddings(310)


def test_a_saved_ensemble_of_one_is_a_folder_like_any_other(pair: Any, tmp_path: Path) -> None:
    import torch

    from cbtm import CbtmForCausalLM

    ensemble, _, _ = pair
    ensemble.save_pretrained(tmp_path / "one")
    ids = torch.tensor([[0, 5, 6]])
    assert torch.equal(CbtmForCausalLM.from_pretrained(tmp_path / "one")(ids).logits, ensemble(ids).logits)
