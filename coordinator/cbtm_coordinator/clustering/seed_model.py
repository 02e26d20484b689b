"""The model that a run starts from, as a Hugging Face folder of safetensors.

A pretrained one is loaded through `AutoModelForCausalLM`, by Hub id, local folder or object-store prefix, and saved
again: what loads here loads on every worker. From scratch: random weights from a config, a function of the recipe's
seed alone. Remote code is never trusted.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cbtm_common.cli import human_bytes
from cbtm_common.errors import InvalidArgument, ResourceExhausted
from cbtm_common.safetensors_header import read_header


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """`directory` holds config.json and safetensors; `context` is the longest sequence, in tokens.

    `trained` are the shapes of its parameters by the names that its modules give them, where the files have others, as
    those of fused experts; else None.
    """

    directory: Path
    parameters: int
    vocab_size: int
    context: int | None
    trained: dict[str, list[int]] | None = None


def fetch_prefix(location: str, target: Path) -> Path:
    """Downloads an `s3://bucket/prefix` folder. Credentials and endpoint come by boto3's usual chain.

    Raises InvalidArgument when there is nothing, or the store refuses.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(location)
    prefix = parts.path.strip("/") + "/"
    found = 0
    try:
        client = boto3.client("s3")
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=parts.netloc, Prefix=prefix):
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(prefix)
                # One folder deep, as a model is; nothing else is fetched.
                if name and "/" not in name and not name.startswith("."):
                    target.mkdir(parents=True, exist_ok=True)
                    client.download_file(parts.netloc, entry["Key"], str(target / name))
                    found += 1
    except (BotoCoreError, ClientError) as error:
        raise InvalidArgument(
            f"seed-model: {location} cannot be read: {first_line(error)}", field="seed-model"
        ) from error
    if not found:
        raise InvalidArgument(f"seed-model: there is nothing at {location}", field="seed-model")
    return target


def load_pretrained(source: str, output: Path) -> BaseModel:
    """Loads and saves a pretrained model. Raises InvalidArgument, saying why it is none."""
    from transformers import AutoModelForCausalLM

    source = local_or_hub(source, field="seed-model")
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype="auto", trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # what a broken folder makes transformers raise is of any class
        raise InvalidArgument(
            f"seed-model: {source!r} is no causal language model that transformers can load: {first_line(error)}",
            field="seed-model",
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would fill them at random, and every expert would start from a damaged model.
        raise InvalidArgument(
            f"seed-model: {source!r} lacks {len(missing)} of its weights, such as {missing[0]}", field="seed-model"
        )
    return _save(model, output)


def check_config(path: Path) -> BaseModel:
    """What the model of a config would be, its weights not made. Raises InvalidArgument, naming what is wrong."""
    import torch

    with torch.device("meta"):
        model = _from_config(_config(path), path)
    return _about(model, path.parent)


def from_scratch(config_path: Path, output: Path, *, seed: int, vocab_size: int, eos_token_id: int) -> BaseModel:
    """Random weights for the config at `config_path` (a Hugging Face config.json with its `model_type`)."""
    import torch

    config = _config(config_path)
    config.vocab_size = vocab_size
    config.eos_token_id = config.bos_token_id = config.pad_token_id = eos_token_id
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = _from_config(config, config_path)
    finally:
        torch.random.set_rng_state(generator_state)
    return _save(model.to(torch.float32), output)


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a model config. Raises InvalidArgument, naming what is missing."""
    try:
        fields = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidArgument(f"from-scratch: {path} cannot be read: {error.strerror}", field="from-scratch") from error
    except ValueError as error:
        raise InvalidArgument(f"from-scratch: {path} is not JSON: {error}", field="from-scratch") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise InvalidArgument(f"from-scratch: {path} has no model_type, such as 'llama'", field="from-scratch")
    return fields


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    fields = read_config(path)
    try:
        return AutoConfig.for_model(**fields)
    except Exception as error:  # each model's config checks itself in its own way
        raise InvalidArgument(f"from-scratch: {path}: {first_line(error)}", field="from-scratch") from error


def _from_config(config: Any, path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # as above
        raise InvalidArgument(
            f"from-scratch: {path} gives no causal language model: {first_line(error)}", field="from-scratch"
        ) from error


def local_or_hub(source: str, *, field: str) -> str:
    """`source` as transformers takes it. Raises InvalidArgument for what can only be a folder and is none."""
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    # A Hub id is NAME or OWNER/NAME.
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise InvalidArgument(f"{field}: there is no folder {source}", field=field)
    return source


def first_line(error: Exception) -> str:
    """What a library's error says, at most one line of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Validation errors of configs say where in the first line and what in the second.
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def check_fit(base: BaseModel, *, sequence_length: int, tokenizer_size: int) -> None:
    """Raises InvalidArgument when the recipe or the tokenizer asks for more than the model has."""
    if base.context is not None and base.context < sequence_length:
        raise InvalidArgument(
            f"recipe: sequence_length {sequence_length} is over the model's context of {base.context} tokens",
            field="sequence_length",
        )
    if tokenizer_size > base.vocab_size:
        raise InvalidArgument(
            f"tokenizer: it has {tokenizer_size} tokens, the model's vocabulary only {base.vocab_size}",
            field="tokenizer",
        )


def _save(model: Any, output: Path) -> BaseModel:
    """Raises ResourceExhausted when the disk has no room for it."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(output.parent).free
    if size > free:
        raise ResourceExhausted(
            f"work-dir: the model takes {human_bytes(size)}, and {output.parent} has only {human_bytes(free)} free; "
            "name a folder on a larger disk by --work-dir"
        )
    # Names the code that a model's own repository brings. None of it was run, and workers refuse what asks for it.
    vars(model.config).pop("auto_map", None)
    with _quiet():
        model.save_pretrained(output)
    return replace(_about(model, output), trained=_trained(model, output))


def _trained(model: Any, directory: Path) -> dict[str, list[int]] | None:
    of_modules = {name: list(p.shape) for name, p in model.named_parameters()}
    of_files = {
        name: list(entry.shape)
        for path in directory.glob("*.safetensors")
        for name, entry in read_header(path).tensors.items()
    }
    return None if of_files == of_modules else of_modules


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own bars and reports would be drawn over ours."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _about(model: Any, directory: Path) -> BaseModel:
    config = model.config
    return BaseModel(
        directory=directory,
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=int(config.vocab_size),
        context=getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None),
    )
