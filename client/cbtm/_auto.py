"""Makes `AutoConfig` and `AutoModelForCausalLM` know `model_type` "cbtm" after `import cbtm`, at no cost to the import.

transformers' registry lives in two of its modules, which take a second to import together with torch. So they are not
imported here: where they are loaded already, the classes are registered at once; else a finder at the head of
`sys.meta_path` waits for each, lets the usual finders load it, registers, and is gone. Chosen over an eager import
(over a second in every command), over an entry point (transformers has none) and over patching `transformers` (its
lazy names bypass a patched attribute). `from transformers import AutoConfig` in any order with `import cbtm` works.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def register_config() -> None:
    from transformers import AutoConfig

    from cbtm._config import CbtmConfig

    AutoConfig.register(CbtmConfig.model_type, CbtmConfig, exist_ok=True)


def register_model() -> None:
    from transformers import AutoModelForCausalLM

    from cbtm._config import CbtmConfig
    from cbtm._model import CbtmForCausalLM

    AutoModelForCausalLM.register(CbtmConfig, CbtmForCausalLM, exist_ok=True)


class _Waiting(importlib.abc.MetaPathFinder):
    """Runs `then` once after the module of that name is loaded."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        # The loader is this spec's own, so only this one load is changed; all else it can do stays.
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            self._then()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    for name, register in ((_CONFIGS, register_config), (_MODELS, register_model)):
        if name in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _Waiting(name, register))
