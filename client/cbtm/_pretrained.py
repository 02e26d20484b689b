"""The options of `CbtmForCausalLM.from_pretrained`: fields of the config, devices, and what does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cbtm._config import CbtmConfig
from cbtm._residency import check_device
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

# Options of from_pretrained that do not matter: experts are always loaded so.
_LOADING = frozenset(
    "trust_remote_code use_safetensors low_cpu_mem_usage weights_only adapter_kwargs code_revision attn_implementation "
    "_from_auto offload_folder ignore_mismatched_sizes _commit_hash".split()
)


def take_config_options(config: CbtmConfig, options: dict[str, Any]) -> None:
    """Takes config fields out of `options`. Raises InvalidArgument for what is neither one nor of no matter."""
    for name in list(options):
        value = options[name]
        if name in _LOADING or value is None or value == "":
            del options[name]
        elif name in CbtmConfig.__dataclass_fields__:
            setattr(config, name, options.pop(name))
    left = sorted(set(options) - {"torch_dtype"})
    if left:
        raise InvalidArgument(f"{left[0]}: from_pretrained of an ensemble takes no such option", field=left[0])


def placement_options(device_map: str | int | torch.device | Mapping[Any, Any] | None) -> dict[str, Any]:
    """`device` or `device_map` of `Ensemble.load`."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, Mapping):
        return {"device_map": {_expert(key): _device(value) for key, value in device_map.items()}}
    if device_map == "auto":
        return {"device_map": "auto"}
    return {} if device_map is None else {"device": _device(device_map)}


def _expert(key: Any) -> str:
    """An expert's name by its index, or by its folder."""
    text = str(key).removeprefix("experts/")
    if not text.isdecimal():
        raise InvalidArgument(
            f"device_map: {key!r} is no expert: experts are not split over devices; give their indices, such as "
            '{0: "cuda:0", 1: "cuda:1"}, one device for all, or "auto"',
            field="device_map",
        )
    return f"expert {int(text)}"


def _device(value: Any) -> str:
    return str(check_device(f"cuda:{value}" if isinstance(value, int) else str(value)))
