"""How the forward pass is computed: attention without a mask, compiled or not; the loss stays the recipe's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cbtm_worker.train import Trainer, read_state, write_checkpoint
from cbtm_worker.train.model import _CAUSAL_ARCHITECTURES, attends_in_windows, load_model
from tests.support.models import make_tiny_model
from tests.support.training import VOCABULARY, make_job, make_recipe

pytestmark = [
    pytest.mark.integration,
    # PyTorch's compiler uses what PyTorch itself has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

LENGTH = 16


def save_model(directory: Path, architecture: str, **fields: Any) -> Path:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        # Each architecture has its own word for the width of its feed-forward layers.
        "intermediate_size": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(architecture, **{**sizes, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    return directory


def assert_attends_as_transformers(directory: Path) -> None:
    ours, _ = load_model(directory, dropout=0.0, sequence_length=LENGTH)
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    ids = torch.randint(1, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", sorted(_CAUSAL_ARCHITECTURES))
def test_attention_without_a_mask_is_the_architectures_own(tmp_path: Path, architecture: str) -> None:
    assert not attends_in_windows(AutoConfig.for_model(architecture), LENGTH)
    assert_attends_as_transformers(save_model(tmp_path / "model", architecture))


def test_an_architecture_with_a_window_under_the_sequence_keeps_it(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "mistral", sliding_window=4)
    config = AutoConfig.from_pretrained(directory)
    assert attends_in_windows(config, LENGTH)
    assert not attends_in_windows(config, 4)
    assert_attends_as_transformers(directory)


def test_an_architecture_that_is_not_known_keeps_its_own_attention(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "gemma3_text", head_dim=8, sliding_window=4)
    assert attends_in_windows(AutoConfig.from_pretrained(directory), LENGTH)
    assert_attends_as_transformers(directory)


def test_compiled_steps_are_the_eager_ones_up_to_rounding_and_a_resume_keeps_compiling(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "small", vocab_size=VOCABULARY, layers=1)
    job = make_job(tmp_path, model_dir=model, recipe=make_recipe(dropout=0.0), total_steps=4)
    with Trainer(job) as trainer:
        eager = [trainer.train_step().loss for _ in range(4)]
    with Trainer(dataclasses.replace(job, compile=True)) as trainer:
        compiled = [trainer.train_step().loss for _ in range(2)]
        write_checkpoint(trainer.snapshot(), tmp_path / "checkpoint", final=False)
    assert read_state(tmp_path / "checkpoint").compiled
    with Trainer(dataclasses.replace(job, resume_dir=tmp_path / "checkpoint")) as trainer:
        compiled += [trainer.train_step().loss for _ in range(2)]
        assert trainer.snapshot().state.compiled
    assert compiled == pytest.approx(eager, abs=1e-4)


def test_without_a_compiler_training_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "no-such-compiler"),))
    # What was compiled before would be used.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    job = make_job(tmp_path)
    with Trainer(dataclasses.replace(job, compile=True)) as trainer, Trainer(job) as eager:
        assert trainer.train_step().loss == eager.train_step().loss
        assert not trainer.snapshot().state.compiled
    assert "torch.compile does not work here" in caplog.text
    assert "no-such-compiler" in caplog.text
