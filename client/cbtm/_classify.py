"""Few-shot classification by the paper's method (arXiv 2303.14177, 4.3): the label whose words are most probable.

A prompt is demonstrations, each text with its label's words, and then the text to classify. The whole prompt is routed
once, with temperature 1 by default, and the mixture scores the words of each label after it. Method "direct" takes the
log-probability of the words; "pmi" subtracts that of the same words after the template without a text
(domain-conditional PMI, arXiv 2104.08315), for labels whose words are likely anyhow.

A task is a JSON-lines file. Its first line is a header, each other line an example:

    {"name": "topics", "template": "{text}\\nTopic:", "labels": {"sport": " sports", "law": " law"}}
    {"text": "The court held …", "label": "law", "split": "train"}
    {"text": "They won the match …", "label": "sport"}

Demonstrations are drawn from split "train", examples of split "test" (the default) are classified.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cbtm._ensemble import Ensemble
from cbtm._residency import check_dtype, load_model
from cbtm._results import check_top_k
from cbtm._scored import Float64, Progress, check_baseline
from cbtm._scoring import TokenSequence, mixture_scores, model_scores
from cbtm_common.errors import InvalidArgument

Method = Literal["direct", "pmi"]
_SLOT = "{text}"
_SEPARATOR = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Example:
    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class ClassificationTask:
    """`labels` maps a label to the words that say it, with the space before them; `template` holds "{text}"."""

    name: str
    template: str
    labels: Mapping[str, str]
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def prompt(self, text: str, demonstrations: Sequence[Example] = ()) -> str:
        shown = [self.template.replace(_SLOT, d.text) + self.labels[d.label] for d in demonstrations]
        return _SEPARATOR.join([*shown, self.template.replace(_SLOT, text)])


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of examples classified rightly: over all seeds' demonstrations, for each of them, for each label."""

    mean: float
    by_seed: tuple[float, ...]
    by_label: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Accuracy by model: "seed", "dense", "top1", …, "all"; `majority` is that of always saying the commonest label."""

    task: str
    examples: int
    shots: int
    seeds: tuple[int, ...]
    method: Method
    temperature: float
    majority: float
    accuracy: Mapping[str, Accuracy]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_task(path: Path) -> ClassificationTask:
    """Reads a task file. Raises InvalidArgument, naming file, line and field."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise InvalidArgument(f"task: there is no file {path}", field="task") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"task: {path} cannot be read: {error}", field="task") from error
    records = [(number, _record(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InvalidArgument(f"task: {path} is empty", field="task")
    (_, header), *examples = records
    labels, template = header.get("labels"), header.get("template")
    if not isinstance(labels, dict) or len(labels) < 2 or not all(isinstance(w, str) and w for w in labels.values()):
        raise InvalidArgument(f"task: {path}:1: labels: two or more, each with its words, are needed", field="labels")
    if not isinstance(template, str) or template.count(_SLOT) != 1:
        raise InvalidArgument(f"task: {path}:1: template: it must hold {_SLOT} once", field="template")
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for number, record in examples:
        text, label, split = record.get("text"), record.get("label"), record.get("split", "test")
        if not isinstance(text, str) or not text.strip():
            raise InvalidArgument(f"task: {path}:{number}: text: is missing or empty", field="text")
        if not isinstance(label, str) or label not in labels:
            raise InvalidArgument(
                f"task: {path}:{number}: label: {label!r} is not one of {', '.join(labels)}", field="label"
            )
        if split not in splits:
            raise InvalidArgument(f"task: {path}:{number}: split: {split!r} is neither train nor test", field="split")
        splits[split].append(Example(text=text, label=label))
    if not splits["test"]:
        raise InvalidArgument(f"task: {path}: it has no example to classify (split test)", field="split")
    return ClassificationTask(
        name=str(header.get("name", path.stem)),
        template=template,
        labels=labels,
        train=tuple(splits["train"]),
        test=tuple(splits["test"]),
    )


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(f"task: {path}:{number}: not JSON: {error}", field="task") from error
    if not isinstance(record, dict):
        raise InvalidArgument(f"task: {path}:{number}: not a JSON object", field="task")
    return record


def classify(
    model: Ensemble,
    task: ClassificationTask,
    *,
    shots: int = 8,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    top_k: Sequence[int] | None = None,
    method: Method = "direct",
    temperature: float = 1.0,
    baseline: Ensemble | None = None,
    progress: Progress | None = None,
) -> Classification:
    """Accuracy of the seed model, `baseline`, and the mixtures of `top_k` (default 1 and 2) and of all experts.

    `seeds` draw the demonstrations, `shots` for each example. Raises InvalidArgument.
    """
    if method not in get_args(Method):
        raise InvalidArgument(f"method: {method!r} is neither direct nor pmi", field="method")
    if not 0 <= shots <= len(task.train):
        raise InvalidArgument(
            f"shots: {shots} is not between 0 and the {len(task.train)} train examples", field="shots"
        )
    if not seeds:
        raise InvalidArgument("seeds: at least one is needed", field="seeds")
    count = len(model.clusters)
    ks = check_top_k([k for k in (1, 2) if k < count] if top_k is None else top_k, count)
    asked = _Questions(model, task, shots=shots, seeds=seeds if shots else seeds[:1], method=method)
    window, stride = model.window_and_stride()
    models: dict[str, Callable[[], Sequence[Float64]]] = {}

    def alone(one: Any) -> Callable[[], Sequence[Float64]]:
        return lambda: model_scores(one, asked.sequences, window=window, stride=stride)

    def mixed(view: Ensemble) -> Callable[[], Sequence[Float64]]:
        return lambda: mixture_scores(view.pool, view.context_router, asked.sequences, window=window, stride=stride)[0]

    if model.parts.seed is not None:
        dtype = check_dtype(model.pool.placement.dtype)
        seed = load_model(model.parts.seed.directory(), name="seed", device=model.pool.device, dtype=dtype)
        models["seed"] = alone(seed)
    if baseline is not None:
        check_baseline(model, baseline)
        models["dense"] = alone(baseline.pool.get(0))
    for k in (*ks, None):
        view = model.with_routing(top_k="all" if k is None else k, temperature=temperature, policy="prompt")
        models["all" if k is None else f"top{k}"] = mixed(view)
    accuracy = {}
    for number, (name, scores) in enumerate(models.items()):
        if progress is not None:
            progress(name, number, len(models))
        accuracy[name] = asked.accuracy([float(values.sum()) for values in scores()])
    if progress is not None:
        progress(name, len(models), len(models))
    commonest = Counter(example.label for example in task.test).most_common(1)[0][1]
    return Classification(
        task=task.name,
        examples=len(task.test),
        shots=shots,
        seeds=tuple(asked.seeds),
        method=method,
        temperature=temperature,
        majority=commonest / len(task.test),
        accuracy=accuracy,
    )


class _Questions:
    """One sequence for each seed, example and label: its words after the prompt; for "pmi", also without a text."""

    def __init__(
        self, model: Ensemble, task: ClassificationTask, *, shots: int, seeds: Sequence[int], method: Method
    ) -> None:
        self.seeds = seeds
        self._task = task
        self._labels = list(task.labels)
        prompts: list[str] = []
        for seed in seeds:
            draw = random.Random(seed)
            prompts += [task.prompt(example.text, draw.sample(task.train, shots)) for example in task.test]
        if method == "pmi":
            # What the words are worth where nothing was said.
            prompts.append(task.prompt(""))
        self._has_null = method == "pmi"
        encoded = [tuple(model.encode(words)) for words in task.labels.values()]
        self.sequences: list[TokenSequence] = []
        for prompt in prompts:
            start = model.sequence_of(model.encode(prompt)).ids
            self.sequences += [TokenSequence(ids=(*start, *words), first=len(start)) for words in encoded]

    def accuracy(self, log_probs: Sequence[float]) -> Accuracy:
        """From the log-probability of each sequence."""
        scores_QL = np.array(log_probs).reshape(-1, len(self._labels))
        if self._has_null:
            scores_QL = scores_QL[:-1] - scores_QL[-1]
        said = scores_QL.argmax(axis=1).reshape(len(self.seeds), -1)
        truth = np.array([self._labels.index(example.label) for example in self._task.test])
        right = said == truth
        return Accuracy(
            mean=float(right.mean()),
            by_seed=tuple(float(value) for value in right.mean(axis=1)),
            by_label={
                label: float(right[:, truth == number].mean())
                for number, label in enumerate(self._labels)
                if (truth == number).any()
            },
        )
