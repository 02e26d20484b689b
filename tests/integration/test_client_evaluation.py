"""`evaluate`, its sweep and figures, and few-shot classification, against their definitions."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import build, make_parts, random_texts
from tests.support.models import EOS_TOKEN_ID

pytestmark = pytest.mark.integration

_TASK = """{"name": "topics", "template": "{text}\\nTopic:", "labels": {"water": " river", "earth": " stone window"}}
{"text": "river harbor", "label": "water", "split": "train"}
{"text": "stone garden", "label": "earth", "split": "train"}
{"text": "mountain", "label": "earth", "split": "train"}
{"text": "harbor village", "label": "water"}
{"text": "copper silver", "label": "earth"}
{"text": "winter river", "label": "water"}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(make_parts(tmp_path_factory.mktemp("parts"), experts=4))


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "ensemble"
    model.save(path)
    return path


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    path.write_text(_TASK)
    return path


def invoke(*arguments: str) -> str:
    from typer.testing import CliRunner

    from cbtm._cli import app

    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


# Perplexity


def test_a_point_of_the_sweep_is_an_evaluation_at_that_temperature(model: Any) -> None:
    from cbtm import evaluate

    texts = random_texts(6, seed=5)
    found = evaluate(model, texts, top_k=[1, 2], temperatures=[0.05, 0.3, 5.0])
    assert [point.temperature for point in found.sweep] == [0.05, 0.3, 5.0]
    for point in found.sweep:
        view = model.with_routing(temperature=point.temperature)
        for name, top_k in (("top1", 1), ("top2", 2), ("all", "all")):
            wanted = view.with_routing(top_k=top_k).perplexity(texts).perplexity
            assert point.perplexity[name] == pytest.approx(wanted, rel=1e-5)
    assert found.sweep[0].perplexity["all"] != pytest.approx(found.sweep[2].perplexity["all"], rel=1e-6)


def test_bits_per_byte_are_the_same_likelihood_over_bytes(model: Any) -> None:
    from cbtm import evaluate

    texts = ["river stone", "größe 東京 данные."]
    found = evaluate(model, texts, top_k=[1])
    size = sum(len(text.encode()) for text in texts)
    assert found.bytes == size
    for name, value in found.bits_per_byte.items():
        assert value == pytest.approx(found.tokens * math.log2(found.perplexity[name]) / size)


def test_rows_of_the_heat_map_are_where_a_clusters_tokens_go(model: Any) -> None:
    from cbtm import evaluate

    texts = random_texts(12, seed=6)
    found = evaluate(model, texts, top_k=[1])
    router = model.parts.router
    for cluster in found.clusters:
        own = [t for t in texts if router.cluster_ids[int(router.assign([t])[0])] == cluster.cluster_id]
        wanted = model.with_routing(top_k="all").perplexity(own).expert_share
        assert cluster.routed == pytest.approx(wanted)
    heaviest = model.with_routing(top_k=1).perplexity(texts).expert_share
    assert found.top1_share == pytest.approx(heaviest)


def test_the_json_states_the_protocol_and_is_json(model: Any) -> None:
    from cbtm import evaluate

    values = json.loads(json.dumps(evaluate(model, ["river"], temperatures=[1.0]).to_dict(), allow_nan=False))
    for word in ("window", "end-of-text", "bits per byte"):
        assert word in values["protocol"]
    assert values["sweep"][0]["temperature"] == 1.0


def test_the_command_writes_figures_and_json(saved: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(6, seed=7)))
    out = tmp_path / "made" / "here"
    shown = invoke("eval", str(saved), "--texts", str(texts), "--temperatures", "0.1,1", "--out", str(out))
    assert "Perplexity by temperature" in shown
    assert "Bits per byte" in shown
    for name in ("perplexity-by-k.png", "routing.png", "perplexity-by-temperature.png"):
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000
    written = json.loads((out / "evaluation.json").read_text())
    printed = json.loads(invoke("eval", str(saved), "--texts", str(texts), "--temperatures", "0.1,1", "--json"))
    assert written == printed


def test_without_matplotlib_it_says_what_to_install_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path
) -> None:
    from cbtm import InvalidState
    from cbtm._cli_eval import eval_command

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidState, match=r"cbtm\[eval\]"):
        eval_command(folder=saved, texts=tmp_path / "not-read", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"top_k": [5]}, "top_k"),
        ({"temperatures": [0.0]}, "temperatures"),
        ({"temperatures": [math.inf]}, "temperatures"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_with_the_field(
    model: Any, arguments: dict[str, Any], field: str
) -> None:
    from cbtm import InvalidArgument, evaluate

    with pytest.raises(InvalidArgument) as refused:
        evaluate(model, ["river"], **arguments)
    assert refused.value.field == field


def test_texts_without_a_token_are_refused(model: Any) -> None:
    from cbtm import InvalidArgument, evaluate

    with pytest.raises(InvalidArgument, match="documents"):
        evaluate(model, [""])


# Classification


def _words_log_prob(model: Any, prompt: str, words: str, *, top_k: int | None, temperature: float) -> float:
    """By the definition: the prompt routed as a whole, every token's full softmaxes mixed."""
    import torch
    from transformers import AutoModelForCausalLM

    router = model.parts.router
    decoded = model.tokenizer.decode(model.encode(prompt), clean_up_tokenization_spaces=False)
    row = router.weights([decoded], temperature=temperature)[0]
    weights = {c.id: float(row[router.cluster_ids.index(c.id)]) for c in model.clusters}
    kept = sorted(weights, key=lambda c: -weights[c])[: top_k or len(weights)]
    ids, answer, total = [EOS_TOKEN_ID, *model.encode(prompt)], model.encode(words), 0.0
    for token in answer:
        mixed = torch.zeros(1, dtype=torch.float64)
        for cluster_id in kept:
            expert = AutoModelForCausalLM.from_pretrained(model.parts.experts[cluster_id].directory()).eval()
            with torch.inference_mode():
                logits = expert(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            mixed += weights[cluster_id] / sum(weights[c] for c in kept) * torch.softmax(logits, -1)[token]
        total += math.log(mixed.item())
        ids.append(token)
    return total


@pytest.mark.parametrize("method", ["direct", "pmi"])
def test_the_label_whose_words_are_most_probable_is_said(model: Any, task_file: Path, method: str) -> None:
    from cbtm import classify, load_task

    task, seeds, shots = load_task(task_file), (3, 8), 1
    found = classify(model, task, shots=shots, seeds=seeds, top_k=[2], method=method, temperature=0.7)
    assert list(found.accuracy) == ["seed", "top2", "all"]

    def scores(prompt: str, top_k: int | None) -> list[float]:
        return [_words_log_prob(model, prompt, w, top_k=top_k, temperature=0.7) for w in task.labels.values()]

    for name, top_k in (("top2", 2), ("all", None)):
        null = np.array(scores("\nTopic:", top_k)) if method == "pmi" else np.zeros(2)
        right = []
        for seed in seeds:
            draw = random.Random(seed)
            for example in task.test:
                (shown,) = draw.sample(task.train, shots)
                prompt = f"{shown.text}\nTopic:{task.labels[shown.label]}\n\n{example.text}\nTopic:"
                said = list(task.labels)[int((np.array(scores(prompt, top_k)) - null).argmax())]
                right.append(said == example.label)
        assert found.accuracy[name].mean == pytest.approx(np.mean(right))
        assert found.accuracy[name].by_seed == pytest.approx([np.mean(right[:3]), np.mean(right[3:])])
    assert found.majority == pytest.approx(2 / 3)


def test_without_demonstrations_one_draw_is_all_there_is(model: Any, task_file: Path) -> None:
    from cbtm import classify, load_task

    found = classify(model, load_task(task_file), shots=0, seeds=(0, 1, 2))
    assert found.seeds == (0,)
    assert set(found.accuracy) == {"seed", "top1", "top2", "all"}


def test_the_classify_command_prints_what_the_library_finds(model: Any, saved: Path, task_file: Path) -> None:
    from cbtm import classify, load_task

    arguments = ["classify", str(task_file), "-e", str(saved), "--shots", "1", "--seeds", "4"]
    wanted = classify(model, load_task(task_file), shots=1, seeds=[4]).to_dict()
    assert json.loads(invoke(*arguments, "--json")) == json.loads(json.dumps(wanted))
    assert "1-shot accuracy" in invoke(*arguments)


def _lines(*changed: tuple[int, str]) -> str:
    lines: list[str] = _TASK.splitlines()
    for number, text in changed:
        lines[number] = text
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (_lines((0, "{")), ":1: not JSON"),
        (_lines((0, "[]")), ":1: not a JSON object"),
        (_lines((0, '{"template": "{text}", "labels": {"one": " 1"}}')), ":1: labels"),
        (_lines((0, '{"template": "{text}", "labels": {"one": " 1", "two": ""}}')), ":1: labels"),
        (_lines((0, '{"template": "no slot", "labels": {"one": " 1", "two": " 2"}}')), ":1: template"),
        (_lines((2, '{"text": "x", "label": "fire"}')), ":3: label: 'fire' is not one of water, earth"),
        (_lines((2, '{"text": " ", "label": "earth"}')), ":3: text"),
        (_lines((2, '{"text": "x", "label": "earth", "split": "dev"}')), ":3: split"),
        ("\n".join(_TASK.splitlines()[:4]), "no example to classify"),
    ],
)
def test_a_task_file_that_is_wrong_is_refused_with_line_and_field(tmp_path: Path, text: str, said: str) -> None:
    from cbtm import InvalidArgument, load_task

    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=said):
        load_task(path)


def test_a_task_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    from cbtm import InvalidArgument, load_task

    with pytest.raises(InvalidArgument, match="there is no file"):
        load_task(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"shots": 4}, "shots"),
        ({"shots": 1, "seeds": ()}, "seeds"),
        ({"shots": 1, "top_k": [9]}, "top_k"),
        ({"shots": 1, "method": "guess"}, "method"),
    ],
)
def test_a_classification_that_cannot_be_is_refused_with_the_field(
    model: Any, task_file: Path, arguments: dict[str, Any], field: str
) -> None:
    from cbtm import InvalidArgument, classify, load_task

    with pytest.raises(InvalidArgument) as refused:
        classify(model, load_task(task_file), **arguments)
    assert refused.value.field == field
