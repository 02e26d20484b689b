"""Ensembles as one transformers model: saved, loaded, and what brute force says that they continue with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.ensembles import brute_force_log_probs, make_parts, random_texts
from tests.support.models import EOS_TOKEN_ID, Architecture

CONTEXT = 64
# Of what `any_k` is tried with; ensembles are opened with 2.
TOP_K = [1, 2, 4]


def save_ensemble(root: Path, architecture: Architecture) -> Path:
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    parts = make_parts(root, experts=4, architecture=architecture, context=CONTEXT)
    Ensemble._of(parts, Placement(), top_k=2, temperature=None).save(root / "saved")
    return root / "saved"


def load(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import cbtm  # noqa: F401

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def prompts_of(model: Any, count: int, *, seed: int, words: tuple[int, int] = (1, 6)) -> list[list[int]]:
    return [[EOS_TOKEN_ID, *model.ensemble.encode(text)] for text in random_texts(count, seed=seed, words=words)]


def padded(rows: list[list[int]], side: str, filler: int = EOS_TOKEN_ID) -> dict[str, Any]:
    import torch

    width = max(map(len, rows))
    blanks = [width - len(row) for row in rows]
    if side == "left":
        ids = [[filler] * n + row for row, n in zip(rows, blanks, strict=True)]
        mask = [[0] * n + [1] * len(row) for row, n in zip(rows, blanks, strict=True)]
    else:
        ids = [row + [filler] * n for row, n in zip(rows, blanks, strict=True)]
        mask = [[1] * len(row) + [0] * n for row, n in zip(rows, blanks, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def brute_greedy(model: Any, ids: list[int], *, top_k: int, tokens: int) -> list[int]:
    added: list[int] = []
    while len(added) < tokens and len(ids) + len(added) < CONTEXT:
        added.append(int(brute_force_log_probs(model.ensemble, [*ids, *added], top_k=top_k).argmax()))
        if added[-1] == EOS_TOKEN_ID:
            break
    return added


def new_tokens(output: Any, width: int) -> list[list[int]]:
    """Without what follows the first end-of-text token."""
    rows = output[:, width:].tolist()
    return [row[: row.index(EOS_TOKEN_ID) + 1] if EOS_TOKEN_ID in row else row for row in rows]
