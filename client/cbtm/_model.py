"""`CbtmForCausalLM`: an ensemble that `transformers` takes for one causal language model.

    import cbtm
    model = AutoModelForCausalLM.from_pretrained("ensemble/")        # a folder that `Ensemble.save` wrote
    model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), num_beams=4)

`logits` are the mixture's log-probabilities, so that softmax gives the mixture back. Every way of `generate` that
`transformers` has for a decoder works on top of that, with keys and values kept for each expert in use. Token ids are
taken as they are: documents in training begin after an end-of-text token, so a prompt had better begin with one.

Not here: training (weights are read only, nothing has a gradient), attention maps and hidden states.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from cbtm._config import CbtmConfig
from cbtm._ensemble import Ensemble
from cbtm._folder import AUTO_MAP, ensemble_config
from cbtm._forward import TokenBatch, batch_log_probs
from cbtm._hub import pull, push
from cbtm._model_cache import MixtureCache
from cbtm._parts import ExpertChanges
from cbtm._pretrained import placement_options, take_config_options
from cbtm._routing import RoutingChange
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from cbtm._ensemble import TopK


class _ContextFull(StoppingCriteria):
    """Ends generation when the longest row fills the experts' context."""

    def __init__(self, limit: int, attention_mask: torch.Tensor | None) -> None:
        padding = 0 if attention_mask is None else int((attention_mask == 0).sum(-1).min())
        self._columns = limit + padding

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        full = input_ids.shape[1] >= self._columns
        return torch.full((len(input_ids),), full, dtype=torch.bool, device=input_ids.device)


class CbtmForCausalLM(PreTrainedModel, GenerationMixin):
    """See the module. `ensemble` is the same experts as text functions: route, score, perplexity.

    Made by `from_pretrained`, or from an ensemble that is open already, which it shares.
    """

    config_class = CbtmConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: CbtmConfig, ensemble: Ensemble | None = None) -> None:
        if ensemble is None:
            raise InvalidArgument(
                "CbtmForCausalLM: a config has no experts; use from_pretrained on a saved ensemble", field="config"
            )
        super().__init__(config)
        self.ensemble = ensemble
        self.post_init()  # type: ignore[no-untyped-call]
        self.train(False)

    @classmethod
    def from_ensemble(cls, ensemble: Ensemble) -> Self:
        """Shares the ensemble's experts and takes its routing."""
        return cls(CbtmConfig(**ensemble_config(ensemble.parts, ensemble.routing)), ensemble)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # fewer options: what makes no sense for an ensemble is refused
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: CbtmConfig | str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        max_experts: int | None = None,
        max_bytes: int | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """From a folder that `save_pretrained` or `Ensemble.save` wrote, or a repository of one.

        No weight is read before an expert is needed. `device_map` names one device for all, "auto" for every GPU there
        is, or a device for each expert by its index, all of which stay whole. At most `max_experts`, `max_bytes` of
        weights, or `max_memory` of each device, are in memory at a time; see `cbtm._residency.Placement`. Fields of
        the config may be given, such as `num_experts_per_tok=1`. Raises NotFound, IntegrityError or InvalidArgument.
        """
        folder = pull(pretrained_model_name_or_path, options)
        if not isinstance(config, CbtmConfig):
            config = CbtmConfig.from_pretrained(config or folder, local_files_only=True)
        take_config_options(config, options)
        dtype = dtype if dtype is not None else options.pop("torch_dtype", None)
        ensemble = Ensemble.load(
            folder,
            top_k=config.num_experts_per_tok,
            temperature=config.routing_temperature,
            **placement_options(device_map),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            max_experts=max_experts,
            max_bytes=max_bytes,
            max_memory=max_memory,
        ).with_routing(
            policy=config.routing_policy,  # type: ignore[arg-type]  # checked there
            weights=config.routing_weights,
            distance=config.routing_distance,  # type: ignore[arg-type]
            interval=config.routing_interval,
            settle_after=config.routing_settle_after or "never",
            seed_below=config.routing_seed_below or "never",
        )
        for name, value in ensemble_config(ensemble.parts, ensemble.routing).items():
            setattr(config, name, value)
        model = cls(config, ensemble)
        model.name_or_path = str(pretrained_model_name_or_path)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        info: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        overwrite: bool = True,
        **options: Any,
    ) -> None:
        """The whole ensemble in one folder: see `cbtm._folder`. An ensemble that is there is replaced as a whole.

        Raises AlreadyExists when the folder holds something else. Weights are written as stored, whatever the dtype
        they are used in, and each expert's shards stay as they are.
        """
        self.ensemble.save(save_directory, overwrite=overwrite, extra=self._config_files())
        if push_to_hub:
            push(Path(save_directory), repo_id or Path(save_directory).name, token=token)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Saves to a temporary folder and uploads all of it; options as in `huggingface_hub`."""
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "ensemble")
            return push(Path(scratch) / "ensemble", repo_id, **options)

    def set_routing(self, *, top_k: TopK = None, temperature: float | None = None, **options: Any) -> None:
        """Mixes otherwise from now on; see `Ensemble.with_routing`. The experts stay in memory."""
        self.ensemble = self.ensemble.with_routing(top_k=top_k, temperature=temperature, **options)
        for name, value in ensemble_config(self.ensemble.parts, self.ensemble.routing).items():
            setattr(self.config, name, value)

    def refresh(self) -> ExpertChanges:
        """Takes up what the run's coordinator has accepted or withdrawn since; see `Ensemble.refresh`."""
        changes = self.ensemble.refresh()
        for name, value in ensemble_config(self.ensemble.parts, self.ensemble.routing).items():
            setattr(self.config, name, value)
        return changes

    # The forward pass

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        routing: RoutingChange | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """`logits` [B, C, V]: log p(next token) after each kept column of `input_ids` [B, T], float32.

        `attention_mask` [B, T] (with `past_key_values`, [B, T so far]) is 0 on padding, which may stand anywhere; a
        column of padding repeats what stands after the last token before it, or is uniform where there is none.
        `use_cache` (default: no, but for `generate`) keeps keys and values. `labels` gives a loss, without gradient.
        `routing` is of this call alone, such as {"top_k": 1}; with a cache, of all calls that share it.
        Raises InvalidArgument for a row without a token, one longer than the context, and ids out of range.
        """
        _refuse(options)
        if input_ids is None:
            raise InvalidArgument("input_ids: a shape [B, T] is needed, not None", field="input_ids")
        batch = TokenBatch.of(input_ids, attention_mask)
        if past_key_values is not None and not isinstance(past_key_values, MixtureCache):
            raise _not_its_cache(past_key_values)
        T = batch.columns
        if use_cache and past_key_values is None:
            past_key_values = MixtureCache()
        if past_key_values is None:
            ensemble, router = self.ensemble, self.ensemble.routed_as(routing)
            batch.check(ensemble.pool)
            columns_C = torch.arange(T)[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep.cpu()
            logits = batch_log_probs(ensemble.pool, router, batch, columns_C)
        else:
            if past_key_values.begins:
                past_key_values.begin(self.ensemble.pool, self.ensemble.routed_as(routing), len(batch.rows))
            elif routing is not None and self.ensemble.routed_as(routing).options != past_key_values.router.options:
                raise InvalidArgument("routing: past_key_values was made with another; begin anew", field="routing")
            batch.check(past_key_values.pool, past_key_values.lengths)
            if batch.mask is None and isinstance(logits_to_keep, int):
                # A step of generation: no time for what follows.
                logits = past_key_values.read(batch.rows, keep=min(logits_to_keep or T, T), columns=T)
            else:
                columns_C = (
                    torch.arange(T)[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep.cpu()
                )
                logits = past_key_values.read_batch(batch, columns_C)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels.to(logits.device), vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    # What transformers asks of a model

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **options: Any) -> Any:
        """As in `transformers`. Also ends when the longest row fills the experts' context, where they have a limit."""
        _refuse(options)
        cache = options.get("past_key_values")
        if cache is not None and not isinstance(cache, MixtureCache):
            raise _not_its_cache(cache)
        if options.get("cache_implementation") is not None:
            raise InvalidArgument("cache_implementation: an ensemble has its own", field="cache_implementation")
        limit = self.ensemble.pool.context
        if limit is not None:
            full = _ContextFull(limit, options.get("attention_mask"))
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), full]
        return super().generate(inputs, *args, **options)  # type: ignore[misc]  # its self is a protocol

    def _prepare_cache_for_generation(  # type: ignore[override]  # the rest is about caches that have a size
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> None:
        """Ours, unless the caller has given one or wants none."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MixtureCache()

    @property
    def device(self) -> torch.device:
        return self.ensemble.pool.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ensemble.pool.dtype

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        raise InvalidArgument(
            "resize_token_embeddings: experts are read only, and share their run's vocabulary", field="vocab_size"
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of all experts together; none is trainable. Embeddings are counted in any case."""
        return 0 if only_trainable else self.ensemble.pool.parameters()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `half` and the like come down to: moves the experts, those to be loaded included."""
        probe = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        if probe.device != self.device or probe.dtype != self.dtype:
            self.ensemble.pool.move(probe.device, probe.dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _init_weights(self, module: torch.nn.Module) -> None:
        """There are none outside the experts."""

    def _config_files(self) -> dict[str, str]:
        self.config.architectures = [type(self).__name__]
        self.config.auto_map = AUTO_MAP
        files = {"config.json": self.config.to_json_string(use_diff=True)}
        if self.generation_config is not None:
            files["generation_config.json"] = self.generation_config.to_json_string(use_diff=True)
        return files


def _refuse(options: Mapping[str, Any]) -> None:
    for name in _REFUSED:
        if options.get(name) is not None and options[name] is not False:
            raise InvalidArgument(f"{name}: an ensemble has no such input or output", field=name)


def _not_its_cache(cache: object) -> InvalidArgument:
    return InvalidArgument(
        f"past_key_values: a {type(cache).__name__} is not this model's; give none, or what it gave",
        field="past_key_values",
    )


# Would change the result, or is asked for, and there is none. Whatever else generation tools pass along has no effect.
_REFUSED = ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states")
