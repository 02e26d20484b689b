"""One expert from its directory, and the devices and dtypes that it may be put in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbtm._alike import ConfigSource
from cbtm_common.errors import IntegrityError, InvalidArgument

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(directory: Path, *, name: str, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`; `dtype` None keeps the stored one.

    Only safetensors and architectures of transformers itself: nothing in the directory is executed.
    Raises IntegrityError when weights are missing, misshapen or unreadable.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(
            directory,
            dtype=dtype if dtype is not None else "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise IntegrityError(f"{name}: {directory} cannot be loaded: {error}") from error
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise IntegrityError(f"{name}: {directory}: {len(wrong)} weights are missing or misshapen: {wrong[0]}")
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    model.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    return model


def check_device(name: str | None) -> torch.device:
    """The device of that name; CPU for None. Raises InvalidArgument when this machine lacks it."""
    import torch

    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise InvalidArgument(f"device: {name!r} is no device: {str(error).splitlines()[0]}", field="device") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        has = "cpu" + "".join(f", cuda:{i}" for i in range(count))
        raise InvalidArgument(
            f"device: {name!r} does not exist here; this machine has {has}", field="device"
        ) from error
    return device


def check_dtype(name: str | None) -> torch.dtype | None:
    """The floating dtype of that name, such as "bfloat16"; None for None or "auto"."""
    import torch

    if name is None or name == "auto":
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidArgument(f"dtype: {name!r} is not one of float32, bfloat16, float16, auto", field="dtype")
    return dtype


def read_config(source: ConfigSource) -> Any:
    """Its text config, as transformers understands it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.config_path(), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidArgument(f"{source.name}: {source.config_path()}: {error}", field="experts") from error
    return config.get_text_config()


def count_weights(source: ConfigSource, directory: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """(numbers, bytes once loaded) of the weights, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    numbers = total = 0
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    part = file.get_slice(key)
                    item = dtype.itemsize if dtype is not None else _ITEM_BYTES.get(part.get_dtype(), 4)
                    numbers += math.prod(part.get_shape())
                    total += math.prod(part.get_shape()) * item
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{source.name}: {path} cannot be read: {error}") from error
    return numbers, total


_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
