"""Hugging Face models: MirasModel and MirasForCausalLM, registered with the Auto classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from miras.layer import MemoryLayer
from miras.lm.backbone import MirasBlock, make_norm
from miras.lm.cache import MirasCache
from miras.lm.config import MirasConfig
from miras.mixer import pack_rows
from miras.modules import (
    FastWeights,
    FeatureNumbers,
    GateProjection,
    OutputNorm,
    ShortConvolution,
    TokenShift,
    initial_values,
    mark_no_weight_decay,
)
from miras.packing import Packing
from miras.persistent import PersistentTokens

OWN = (FastWeights, FeatureNumbers, GateProjection, OutputNorm, PersistentTokens, ShortConvolution, TokenShift)
"""Modules that know their own initial values."""

IGNORED = -100
"""Label of a token that the loss leaves out."""


class MirasPreTrainedModel(PreTrainedModel):
    """What the two models share: initial values, and what Hugging Face may do with them."""

    config_class = MirasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: set[str] | list[str] | None = ["MirasBlock"]  # noqa: RUF012
    _input_embed_layer = "embeddings"
    _is_stateful = True  # No going back to earlier tokens, so no assisted generation.
    _keep_in_fp32_modules_strict: set[str] | list[str] | None = ["memory"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OWN):
            for name, value in initial_values(module).items():
                init.copy_(module.get_parameter(name), value)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Hugging Face's initialisation, then what depends on two modules: aligned query and key projections."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, MemoryLayer) and module.design.inputs.aligned:
                init.copy_(module.q_proj.weight, module.k_proj.weight[: module.q_proj.out_features])

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        options: dict[str, Any] = getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {})
        designs = (self.config.layer_design(i) for i in range(self.config.num_hidden_layers))
        if options.get("use_reentrant") and any(p.inputs.features.shares for design in designs for p in design.parts):
            raise ValueError("use_reentrant=True would lose gradients of what this model's layers share; set it to False")
        super()._set_gradient_checkpointing(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's `from_pretrained`; marks what must not have weight decay in the loaded parameters too."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, (FastWeights, FeatureNumbers, GateProjection, PersistentTokens, TokenShift)):
                mark_no_weight_decay(module)
        return loaded


class MirasModel(MirasPreTrainedModel):
    """Embeddings, blocks and a final RMSNorm: token ids [B, T] to hidden states [B, T, hidden_size]."""

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MirasBlock(config, i) for i in range(config.num_hidden_layers)])
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MirasCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids [B, T] (or `inputs_embeds` [B, T, hidden_size]) to hidden states.

        attention_mask   [B, T], 1 at real tokens; padding on any side changes nothing and comes out as zeros. With a
                         cache its last T columns count
        cu_seqlens       [0, end of first, ..., T] for B = 1: separate sequences laid end to end; `position_ids` that
                         start again at 0, or `cu_seq_lens_q`, say the same, as Hugging Face's collators do
        past_key_values  a MirasCache: continued, and written unless use_cache is False
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True: a memory has no attention weights; see MemoryLayer.inspect")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden if self.embedding_norm is None else self.embedding_norm(hidden)
        use_cache = self._wants_cache(use_cache)
        if past_key_values is None and use_cache:
            past_key_values = MirasCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, MirasCache):
            raise TypeError(f"past_key_values must be a miras.MirasCache, got {type(past_key_values).__name__}")
        if cu_seqlens is None:
            cu_seqlens = _collated_bounds(hidden, attention_mask, past_key_values, kwargs)
        packing = pack_rows(hidden, attention_mask, cu_seqlens)
        padded = packing if packing is not None and packing.tokens is not None else None
        hidden = hidden if padded is None else padded.pack(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden, seen = self._run(hidden, past_key_values, use_cache, packing, bool(output_hidden_states))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden if padded is None else padded.pad(hidden),
            past_key_values=past_key_values if use_cache else None,  # type: ignore[arg-type]
            hidden_states=tuple(x if padded is None else padded.pad(x) for x in seen) if output_hidden_states else None,
        )

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if self.gradient_checkpointing and self.training:
            return False
        return use_cache if use_cache is not None else self.config.use_cache and not self.training

    def _run(
        self, hidden: Tensor, cache: MirasCache | None, use_cache: bool, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        seen = [hidden] if keep else []
        shared: dict[str, Tensor] = {}
        for layer in self.layers:
            hidden = layer(hidden, past_key_values=cache, use_cache=use_cache, packing=packing, shared=shared)
            if keep:
                seen.append(hidden)
        hidden = self.norm(hidden)
        if keep:
            seen[-1] = hidden
        return hidden, seen


class MirasForCausalLM(MirasPreTrainedModel, GenerationMixin):
    """A language model: MirasModel and a head, tied to the embeddings by default.

    >>> model = MirasForCausalLM(MirasConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_heads=4))
    >>> loss = model(input_ids, labels=input_ids).loss
    >>> model.generate(input_ids, max_new_tokens=20)
    """

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        self.model = MirasModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MirasCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size], and the mean loss if `labels` [B, T] are given.

        Labels are shifted here: logits at t are scored against labels at t + 1; -100 is left out, and so is the first
        token of every packed sequence. `num_items_in_batch` divides the summed loss in the mean's place, as the Trainer
        wants it under gradient accumulation. `logits_to_keep` keeps the last few positions, or those it indexes. The
        rest is as in `MirasModel.forward`.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if cu_seqlens is None and given is not None:
            cu_seqlens = _collated_bounds(given, attention_mask, past_key_values, kwargs)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept] if not isinstance(kept, slice) or kept.start else hidden)
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.index_fill(1, cu_seqlens[:-1].to(labels.device).long(), IGNORED)
            loss_function: Any = self.loss_function
            loss = loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[attr-defined]
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a Miras model has one kind of "
                "cache, of constant size; leave cache_implementation out"
            )
        model_kwargs["past_key_values"] = MirasCache(self.config)
        return None


def _collated_bounds(given: Tensor, mask: Tensor | None, cache: MirasCache | None, kwargs: dict[str, Any]) -> Tensor | None:
    """cu_seqlens as Hugging Face's flattening collators say it: `cu_seq_lens_q`, or positions that start again at 0."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return kwargs["cu_seq_lens_q"]
    positions = kwargs.get("position_ids")
    if positions is None or given.shape[0] != 1 or mask is not None or (cache is not None and cache.is_initialized):
        return None
    starts = (positions.reshape(-1) == 0).nonzero().squeeze(1)
    if len(starts) < 2:
        return None
    return torch.cat((starts, starts.new_tensor([given.shape[1]])))


AutoConfig.register("miras", MirasConfig, exist_ok=True)
AutoModel.register(MirasConfig, MirasModel, exist_ok=True)
AutoModelForCausalLM.register(MirasConfig, MirasForCausalLM, exist_ok=True)
