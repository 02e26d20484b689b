"""lm-evaluation-harness on a saved ensemble: its own program, and its Python interface, against brute force."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ensembles import brute_force_log_probs, build, make_parts, random_texts
from tests.support.models import EOS_TOKEN_ID

pytestmark = pytest.mark.integration

_TOP_K = 2
_NEW_TOKENS = 3
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
_TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "local_generate": f"""
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: {_NEW_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}
_PYTHON = """
import json, sys
import cbtm
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tasks = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=3, device="cpu")
found = simple_evaluate(lm, tasks=["local_choice"], task_manager=TaskManager(include_path=tasks))
samples = sorted(found["samples"]["local_choice"], key=lambda s: s["doc_id"])
print(json.dumps([[float(r[0]) for r in s["filtered_resps"]] for s in samples]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(make_parts(tmp_path_factory.mktemp("parts"), experts=3, top_k=_TOP_K))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "ensemble"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    texts = random_texts(5, seed=3, words=(1, 5))
    return [{"text": t, "choices": ["river", "stone window"], "gold": n % 2} for n, t in enumerate(texts)]


@pytest.fixture(scope="module")
def tasks(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    data = path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, text in _TASKS.items():
        (path / f"{name}.yaml").write_text(_TASK.format(name=name, data=data) + text)
    return path


def _environment(cache: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline}


@pytest.fixture(scope="module")
def samples(folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the harness' own program asked and was told, by task, in the order of the documents."""
    out = tmp_path_factory.mktemp("out")
    # It knows nothing of cbtm: the folder says what to load.
    program = [str(Path(sys.executable).parent / "lm_eval"), "--model", "hf", "--tasks", ",".join(_TASKS)]
    program += ["--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    program += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "2"]
    program += ["--output_path", str(out), "--log_samples"]
    done = subprocess.run(program, env=_environment(out / "hf"), cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in _TASKS:
        (path,) = out.glob(f"*/samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[name] = sorted(rows, key=lambda row: int(row["doc_id"]))
    return found


def _log_prob(model: Any, before: list[int], after: list[int]) -> float:
    """By the definition, token by token."""
    return sum(
        float(brute_force_log_probs(model, [*before, *after[:n]], top_k=_TOP_K)[token]) for n, token in enumerate(after)
    )


def _choices(model: Any, documents: list[dict[str, Any]]) -> list[list[float]]:
    wanted = []
    for document in documents:
        # The harness splits where the two meet, after tokenizing them as one; spaces there are the answer's.
        before = model.encode(document["text"].rstrip())
        wholes = [model.encode(f"{document['text']} {choice}") for choice in document["choices"]]
        wanted.append([_log_prob(model, whole[: len(before)], whole[len(before) :]) for whole in wholes])
    return wanted


def test_its_multiple_choice_is_told_the_mixtures_log_likelihoods(
    model: Any, documents: list[dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> None:
    for sample, wanted in zip(samples["local_choice"], _choices(model, documents), strict=True):
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(wanted, abs=1e-3)


def test_its_rolling_log_likelihood_is_that_of_the_whole_text(
    model: Any, documents: list[dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> None:
    for sample, document in zip(samples["local_rolling"], documents, strict=True):
        wanted = _log_prob(model, [EOS_TOKEN_ID], model.encode(document["text"]))
        assert float(sample["filtered_resps"][0]) == pytest.approx(wanted, abs=1e-3)


def test_its_greedy_generation_is_that_of_the_mixture(
    model: Any, documents: list[dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> None:
    for sample, document in zip(samples["local_generate"], documents, strict=True):
        ids = model.encode(document["text"])
        prompt = len(ids)
        while len(ids) < prompt + _NEW_TOKENS and EOS_TOKEN_ID not in ids[prompt:]:
            ids.append(int(brute_force_log_probs(model, ids, top_k=_TOP_K).argmax()))
        wanted = model.tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        assert sample["filtered_resps"][0] == wanted.split("\n\n")[0]


def test_its_python_interface_takes_the_model_itself(
    model: Any, folder: Path, tasks: Path, documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(_PYTHON)
    program = [sys.executable, str(script), str(folder), str(tasks)]
    done = subprocess.run(
        program, env=_environment(tmp_path / "hf"), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for found, wanted in zip(json.loads(done.stdout.splitlines()[-1]), _choices(model, documents), strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)
