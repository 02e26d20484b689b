"""What users and damaged folders get wrong about an ensemble: each is said, with the field and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ensembles import build, make_parts

pytestmark = pytest.mark.integration


class TestMistakes:
    def test_more_experts_than_there_are(self, parts: Any) -> None:
        from cbtm import InvalidArgument

        with pytest.raises(InvalidArgument, match="top_k: 5 is not between 1 and 4"):
            build(parts, top_k=5)

    def test_an_empty_prompt(self, model: Any) -> None:
        from cbtm import InvalidArgument

        with pytest.raises(InvalidArgument, match="prompt: number 2 is empty"):
            model.generate(["river", ""])

    def test_a_prompt_longer_than_the_context(self, model: Any) -> None:
        from cbtm import InvalidArgument

        with pytest.raises(InvalidArgument, match="the experts' context holds 63"):
            model.generate("river stone " * 40)

    def test_a_device_that_does_not_exist(self, parts: Any) -> None:
        from cbtm import InvalidArgument

        for name in ("cuda:99", "abacus"):
            with pytest.raises(InvalidArgument, match=f"device: '{name}'"):
                build(parts, device=name)

    def test_experts_of_two_vocabularies(self, tmp_path: Path) -> None:
        from cbtm import InvalidArgument
        from tests.support.models import make_tiny_model

        parts = make_parts(tmp_path, experts=2)
        make_tiny_model(tmp_path / "model1", vocab_size=310, hidden_size=16)
        with pytest.raises(InvalidArgument, match="expert 1 and expert 0 do not fit together: vocab_size"):
            build(parts)

    def test_experts_of_two_architectures(self, tmp_path: Path) -> None:
        from cbtm import InvalidArgument
        from tests.support.models import make_tiny_model

        parts = make_parts(tmp_path, experts=2)
        make_tiny_model(tmp_path / "model1", architecture="gpt2", vocab_size=300, hidden_size=16)
        with pytest.raises(InvalidArgument, match="model_type is 'gpt2' in one and 'llama' in the other"):
            build(parts)

    def test_experts_of_two_contexts(self, tmp_path: Path) -> None:
        from cbtm import InvalidArgument
        from tests.support.models import make_tiny_model

        parts = make_parts(tmp_path, experts=2)
        make_tiny_model(tmp_path / "model1", vocab_size=300, hidden_size=16, context=32)
        with pytest.raises(InvalidArgument, match="max_position_embeddings is 32 in one and 64 in the other"):
            build(parts)

    def test_an_expert_that_brings_another_tokenizer(self, tmp_path: Path) -> None:
        import shutil

        from cbtm import InvalidArgument
        from tests.support.ensembles import WORDS
        from tests.support.models import make_tiny_tokenizer

        parts = make_parts(tmp_path, experts=2)
        shutil.copyfile(tmp_path / "tokenizer/tokenizer.json", tmp_path / "model0/tokenizer.json")
        make_tiny_tokenizer(tmp_path / "other", [" ".join(WORDS[12:])] * 3, vocab_size=300)
        shutil.copyfile(tmp_path / "other/tokenizer.json", tmp_path / "model1/tokenizer.json")
        model = build(parts)
        assert model.with_routing(weights=[1.0, 0.0]).score("river").log_prob < 0
        with pytest.raises(InvalidArgument, match="expert 1: its tokenizer is not the ensemble's"):
            model.with_routing(weights=[0.0, 1.0]).score("river")

    def test_a_tokenizer_with_more_ids_than_the_experts_know(self, tmp_path: Path) -> None:
        from cbtm import InvalidArgument
        from tests.support.ensembles import WORDS
        from tests.support.models import make_tiny_tokenizer

        parts = make_parts(tmp_path, experts=2)
        make_tiny_tokenizer(tmp_path / "tokenizer", [" ".join(WORDS)] * 3, vocab_size=400)
        with pytest.raises(InvalidArgument, match=r"tokenizer: it has .* ids and the experts know 300"):
            build(parts)

    def test_a_damaged_and_a_missing_expert_file(self, model: Any, tmp_path: Path) -> None:
        from cbtm import Ensemble, IntegrityError

        model.save(tmp_path / "saved")
        weights = tmp_path / "saved/experts/0001/model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"expert 1: .*model.safetensors is damaged"):
            Ensemble.load(tmp_path / "saved", top_k="all").score("river")
        weights.unlink()
        with pytest.raises(IntegrityError, match=r"expert 1: .*model.safetensors is missing"):
            Ensemble.load(tmp_path / "saved", top_k="all").score("river")

    def test_truncated_weights_in_a_plain_folder(self, tmp_path: Path) -> None:
        from cbtm import IntegrityError

        parts = make_parts(tmp_path, experts=2)
        weights = tmp_path / "model0/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(IntegrityError, match=r"expert 0: .* cannot be"):
            build(parts, top_k="all").score("river")

    def test_an_expert_over_the_byte_budget(self, parts: Any) -> None:
        from cbtm import ResourceExhausted

        with pytest.raises(ResourceExhausted, match=r"max_bytes: expert . takes"):
            build(parts, max_bytes=1000).score("river")

    def test_nothing_to_score(self, model: Any) -> None:
        from cbtm import InvalidArgument

        assert model.score("").log_prob == 0
        with pytest.raises(InvalidArgument, match="texts: they hold no token"):
            model.perplexity([""])

    def test_saving_over_something_else(self, model: Any, tmp_path: Path) -> None:
        from cbtm import AlreadyExists

        (tmp_path / "notes.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(AlreadyExists):
                model.save(tmp_path, overwrite=overwrite)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        model.save(tmp_path / "saved")
        model.save(tmp_path / "saved", overwrite=True)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
