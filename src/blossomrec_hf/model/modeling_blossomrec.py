"""BlossomRec as a model of `transformers`: an item-id sequence in, scores over the catalogue out."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .append_blossomrec import Append
from .attention_blossomrec import BlossomAttention, BlossomCompressor, BlossomGate
from .cache_blossomrec import BlossomRecCache
from .checkpoint_blossomrec import CheckpointMixin
from .configuration_blossomrec import BlossomRecConfig
from .ids_blossomrec import IGNORE_INDEX, NUM_SPECIAL_IDS
from .loss_blossomrec import given_targets, next_item_targets
from .manifest_blossomrec import require_loadable
from .modules_blossomrec import check_inference, dense_weight
from .objectives_blossomrec import find_objective
from .outputs_blossomrec import BlossomRecModelOutput, BlossomRecOutput, LayerSelection
from .packing_blossomrec import PackedHistories, pack_histories
from .recommendation_blossomrec import RecommendationMixin, as_ids


if TYPE_CHECKING:
    # Nothing here uses them. `transformers` copies to a checkpoint, and loads from one, the files that this one imports
    # anywhere: these two are to travel, too.
    from .pipeline_blossomrec import SequentialRecommendationPipeline  # noqa: F401
    from .tokenization_blossomrec import BlossomRecTokenizer  # noqa: F401

# Where the Auto classes and `pipeline` find the code in a checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_blossomrec.BlossomRecConfig",
    "AutoModel": "modeling_blossomrec.BlossomRecModel",
    "AutoModelForCausalLM": "modeling_blossomrec.BlossomRecForSequentialRecommendation",
    "AutoTokenizer": ["tokenization_blossomrec.BlossomRecTokenizer", None],
}
CUSTOM_PIPELINES = {
    "sequential-recommendation": {
        "impl": "pipeline_blossomrec.SequentialRecommendationPipeline",
        "pt": ["AutoModelForCausalLM"],
        "type": "text",
    }
}


# Keywords that `transformers` may pass to any model and that change nothing here, as long as they have this value.
_HARMLESS_KEYWORDS = {"is_causal": True, "output_router_logits": False}


class GenerationError(AttributeError, ValueError):
    """
    Raised for everything that generates sequences. An `AttributeError`, so that `hasattr(model, "generate")` is false.
    """

    def __init__(self) -> None:
        super().__init__(
            "BlossomRec recommends the next item and does not generate sequences; use `model.recommend(input_ids)` or "
            '`pipeline("sequential-recommendation", model=...)`.'
        )


class Dropout(nn.Dropout):
    """Dropout whose mode is an argument: inference does not change that of a module, which other threads may use."""

    def forward(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        return nn.functional.dropout(x, self.p, training)


class BlossomRecLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual connection and a layer norm after it."""

    def __init__(self, config: BlossomRecConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BlossomAttention(config, layer_idx)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, training: bool, keep: torch.Tensor | slice | None = None, **kwargs):
        attended, *details = self.self_attn(hidden_states, keep=keep, **kwargs)
        if keep is not None:
            hidden_states = hidden_states[:, keep]
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended, training))
        fed = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.feed_forward_norm(hidden_states + self.dropout(fed, training)), *details


class BlossomRecPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """Initialisation, and what `transformers` must know of BlossomRec models."""

    config: BlossomRecConfig
    config_class = BlossomRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BlossomRecLayer"]
    _supports_attention_backend = True

    def __init__(self, config: BlossomRecConfig, *args: Any, **kwargs: Any) -> None:
        config.check()  # its attributes may have been set since it was made
        super().__init__(config, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            # FSDP2 gives a sharded model a class of its own, which no checkpoint can name: it goes by its parent's name.
            parent = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = parent.__module__, parent.__name__

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # Where nothing is asked, `transformers` would turn a custom model to "eager", the reference.
        return super().get_correct_attn_implementation(requested_attention or "blossom", is_init_check)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """
        As in `transformers`; the configuration also names the code of the model, the tokenizer and the pipeline.

        Raises:
            ValueError: for a model or configuration of a class that is defined in a script, a notebook or a function.
        """
        for part in (self, self.config):
            require_loadable(type(part))
        if self._auto_class is not None:  # set where the code itself is saved
            self.config.auto_map = dict(AUTO_MAP)
            self.config.custom_pipelines = CUSTOM_PIPELINES
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlossomCompressor):
            init.normal_(module.position, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, BlossomGate):
            init.zeros_(module.weight)
            bias = torch.tensor(self.config.gate_initial_bias).repeat_interleave(self.config.num_attention_heads)
            init.copy_(module.bias, bias)
        elif isinstance(module, BlossomRecModel):
            init.zeros_(module.item_counts)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As in `transformers`, for a catalogue: old rows are left as they are, `item_counts` grows along with zeros, and
        with `mean_resizing` (the default) a new item begins at the mean of the old ones.
        """
        old = self.get_input_embeddings().num_embeddings
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing=False)
        new = embeddings.num_embeddings
        base = self.base_model
        counts = base.item_counts.new_zeros(new)
        counts[: min(old, new)] = base.item_counts[:new]
        base.item_counts = counts
        tables = {id(m.weight): m.weight for m in (embeddings, self.get_output_embeddings()) if m is not None}
        if mean_resizing and new > old:
            for weight in tables.values():
                weight.data[old:] = weight.data[NUM_SPECIAL_IDS:old].mean(0)
        return embeddings


class BlossomRecModel(BlossomRecPreTrainedModel):
    """Item embedding and layers: item ids in, hidden states out."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([BlossomRecLayer(config, i) for i in range(config.num_hidden_layers)])
        self.register_buffer("item_counts", torch.zeros(config.vocab_size, dtype=torch.long))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.item_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.item_embedding = value

    def rotary_embedding(self, position: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[1, T, head_dim]` of the rotary embedding at `position` `[T]`, in float32 or better."""
        dtype = torch.promote_types(dtype, torch.float32)
        rope, width, scale = self.config.rope_parameters, self.config.head_dim, 1.0
        if rope["rope_type"] == "default":
            exponent = torch.arange(0, -width, -2, device=position.device, dtype=dtype) / width
            inverse_frequency = rope["rope_theta"] ** exponent
        else:
            inverse_frequency, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, position.device)
        angle = position.to(dtype)[:, None] * inverse_frequency.to(dtype)
        angle = torch.cat([angle, angle], -1)[None]
        return angle.cos() * scale, angle.sin() * scale

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_selection: bool | None = None,
        past_key_values: BlossomRecCache | None = None,
        cache: BlossomRecCache | None = None,
        use_cache: bool | None = None,
        packed: PackedHistories | None = None,
        append: Append | None = None,
        last_only: bool = False,
        training: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BlossomRecModelOutput:
        """
        Args:
            input_ids: item ids `[B, L]`, padded on any side, or packed `[1, T]`.
            attention_mask: `[B, L]`, 0 at padding. Where it is missing, [PAD] ids are padding.
            position_ids: `[B, L]`; positions that restart at 0 in a single row mark packed histories.
            inputs_embeds: `[B, L, hidden_size]`, in place of `input_ids`.
            cu_seq_lens_q, max_length_q: offsets `[S + 1]` and longest length of packed histories; `cu_seq_lens_k` and
                `max_length_k`, which collators send along, say the same.
            output_attentions: the reference path (`attn_implementation="eager"`) alone has probabilities to give.
            output_selection: what every layer selected, and its gates; on every path.
            past_key_values: cached histories; if given, the input contains only their new events, and so does
                the output. In evaluation mode, without gradients. Events are not counted by `position_ids`, and marked
                by `attention_mask` as any input is. `cache` is another name for it.
            use_cache: whether the histories are kept: `True` makes a cache where none is given, `False` leaves the
                given one as it was. `None` means `True` where a cache is given.
            packed: what `pack_histories` made of these inputs, where that is known already.
            append: what `begin_append` made of the cache and these inputs, for a caller that commits it.
            last_only: `last_hidden_state` is that of each history's last position alone, `[S, 1, hidden_size]` (of an
                empty history, anything), and the last layer is spared the others but for their keys and values.
                Without a cache, `output_hidden_states` and `output_selection`.
            training: whether dropout is applied. Defaults to the model's mode. `recommend` passes `False`, so that
                threads may share a model whatever its mode is.

        Raises:
            ValueError: for ids outside the vocabulary, offsets or positions that do not describe the input,
                attentions asked of a path that has none, a cache that does not fit the model or the input (it is
                left as it was), and keywords that the model does not know.
        """
        _check_keywords(kwargs, position_ids, cu_seq_lens_q)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, and not both.")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f'`output_attentions=True` works with `attn_implementation="eager"` only; '
                f"{self.config._attn_implementation!r} never has all probabilities at once. "
                "`output_selection=True` tells what was attended to on every path."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if packed is None:
            packed = pack_histories(
                inputs,
                attention_mask,
                position_ids,
                cu_seq_lens_q,
                max_length_q,
                self.config.vocab_size,
                cu_seqlens_k=cu_seq_lens_k,
                max_seqlen_k=max_length_k,
                drop_padding=past_key_values is not None or cache is not None or bool(use_cache),
            )
        training = self.training if training is None else training
        cache = past_key_values if cache is None else cache
        own_append = append is None and (cache is not None or use_cache)
        if own_append:
            append = self.begin_append(cache, packed, input_ids, training=training)
        if append is not None and output_attentions:
            raise ValueError("`output_attentions=True` cannot be combined with a cache; `output_selection=True` can.")
        if last_only and (append is not None or output_hidden_states or output_selection):
            raise ValueError(
                "`last_only=True` cannot be combined with a cache, `output_hidden_states=True` or "
                "`output_selection=True`, which tell of all positions."
            )
        keep = None
        if last_only and packed.position.shape[0] and packed.lengths is None:
            one = packed.cu_seqlens.shape[0] == 2 and not torch.compiler.is_compiling()
            keep = slice(-1, None) if one else (packed.cu_seqlens[1:] - 1).clamp(min=0)
        position = packed.position if append is None else append.position
        with torch.set_grad_enabled(torch.is_grad_enabled() and append is None):
            # Embedded in the shape of the input: NEFTune's noise depends on it.
            hidden_states = packed.pack(self.item_embedding(input_ids) if inputs_embeds is None else inputs)
            hidden_states = self.dropout(self.embedding_norm(hidden_states), training)[None]

            position_embeddings = self.rotary_embedding(position, hidden_states.dtype)
            states, attentions, selections = [], [], []
            for layer in self.layers:
                if output_hidden_states:
                    states.append(packed.unpack(hidden_states[0]))
                    hidden_states = packed.pack(states[-1])[None]  # what is returned has a gradient (`retain_grad()`)
                hidden_states, selection, gates, probs = layer(
                    hidden_states,
                    training=training,
                    keep=keep if layer is self.layers[-1] else None,
                    position_embeddings=position_embeddings,
                    cu_seqlens=packed.cu_seqlens,
                    max_seqlen=packed.max_seqlen,
                    output_attentions=bool(output_attentions),
                    append=append,
                )
                if output_attentions:
                    attentions.append(packed.unpack_pairs(probs))
                if output_selection:
                    selections.append(_layer_selection(packed, selection, gates))
        if own_append and use_cache is not False:
            append.commit(hidden_states[0])
        if keep is not None:
            last_hidden_state = hidden_states[0][:, None]
        else:  # all of them, or no token anywhere
            last_hidden_state = packed.last(hidden_states[0], 1) if last_only else packed.unpack(hidden_states[0])
        return BlossomRecModelOutput(
            last_hidden_state=last_hidden_state,
            hidden_states=(*states, last_hidden_state) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            selections=tuple(selections) if output_selection else None,
            cache=None if append is None else append.cache,
        )

    def begin_append(
        self, cache: BlossomRecCache | None, packed: PackedHistories, input_ids: torch.Tensor | None, *, training: bool
    ) -> Append:
        """
        The new events `packed` on their way into `cache` (or a new one).

        Raises:
            ValueError: in training mode, and for a cache that does not fit the model or the events.
        """
        if training:
            raise ValueError("A cache works in evaluation mode; call `model.eval()`, or leave out `past_key_values`.")
        check_inference(self)
        cache = BlossomRecCache(self.config) if cache is None else cache
        if not isinstance(cache, BlossomRecCache):
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__}; BlossomRec's histories need a `BlossomRecCache` (or "
                "`use_cache=True` alone, which makes one)."
            )
        weights = cache.check_model(self)
        items = None if input_ids is None else packed.pack(input_ids)
        return Append(cache, packed.cu_seqlens, items, packed.position.shape[0], weights)


def _check_keywords(keywords: dict[str, Any], position_ids: Any, cu_seq_lens_q: Any) -> None:
    """Refuses all other keywords by name: whoever passes one expects an effect."""
    for name, value in keywords.items():
        harmless = value is None or (name in _HARMLESS_KEYWORDS and value is _HARMLESS_KEYWORDS[name])
        if name == "seq_idx":  # the number of each token's history, which some collators send next to these
            harmless = harmless or position_ids is not None or cu_seq_lens_q is not None
        if not harmless:
            raise ValueError(f"`{name}` is not an input of BlossomRec; leave it out of the call or the batch.")


def _layer_selection(packed: PackedHistories, selection, gates) -> LayerSelection:
    block_indices, importance = (None, None) if selection is None else selection
    if block_indices is not None:  # shifted, so that padding reads −1
        block_indices, importance = packed.unpack(block_indices + 1) - 1, packed.unpack(importance)
    return LayerSelection(block_indices, importance, None if gates is None else packed.unpack(gates[0]))


class BlossomRecForSequentialRecommendation(RecommendationMixin, BlossomRecPreTrainedModel):
    """BlossomRec with scores over the catalogue: next-item training, evaluation and recommendation."""

    _tied_weights_keys = {"lm_head.weight": "model.item_embedding.weight"}

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        find_objective(config.objective)
        self.loss_type = "ForCausalLM"  # `Trainer` then leaves the first label of each row out of its count of targets
        self.model = BlossomRecModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _shift_labels_of(cls)

    def __getattr__(self, name: str) -> Any:
        if name in ("generate", "generation_config"):
            raise GenerationError
        return super().__getattr__(name)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `GenerationError`; adapters with `task_type="CAUSAL_LM"` ask for it and never call it in training."""
        raise GenerationError

    @classmethod
    def can_generate(cls) -> bool:
        """
        `False`. A pipeline that generates asks this first and would then fail without a reason: it is refused here.
        """
        if getattr(sys._getframe(1).f_locals.get("self"), "_pipeline_calls_generate", False):
            raise GenerationError
        return False

    @property
    def item_counts(self) -> torch.Tensor:
        """How often each vocabulary id occurs in the training data, `[vocab_size]` int64; saved with the model."""
        return self.model.item_counts

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def item_vectors(self, ids: torch.LongTensor | Sequence[int] | None = None) -> torch.Tensor:
        """
        The vectors whose dot products with the last hidden state are the logits. With `tie_word_embeddings=True` they
        are the input embedding, otherwise weights of their own. All scores, losses and indexes use this method.

        Args:
            ids (`torch.LongTensor` or `list[int]` `[N]`, *optional*): vocabulary ids. Defaults to the whole vocabulary.

        Returns:
            `[vocab_size, hidden_size]` or `[N, hidden_size]`, differentiable, in the dtype of the weights. Without `ids`
            this is the weight itself, or computed if the output embedding is offloaded, quantized or adapted.

        Raises:
            ValueError: if `ids` is not one list of vocabulary ids.
        """
        vectors = dense_weight(self.lm_head)
        if ids is None:
            return vectors
        ids = as_ids("ids", ids, 0, vectors.device, self.config.vocab_size)
        if ids.dim() != 1:
            raise ValueError(f"`ids` has shape {tuple(ids.shape)}; it must be one list of vocabulary ids.")
        return vectors[ids]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_selection: bool | None = None,
        past_key_values: BlossomRecCache | None = None,
        cache: BlossomRecCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BlossomRecOutput:
        """
        Args:
            labels: item ids `[B, L]` aligned with the input, shifted inside: every position predicts the next item of
                its history. −100, [PAD] and [UNK] are no targets. Instead of them, `shift_labels` `[B, L]` gives the
                target of every position itself.
            logits_to_keep: n > 0 returns logits of the last n real positions of each history alone, `[S, n,
                vocab_size]` (S rows, or packed histories), zero where a history is shorter. The loss is not affected.
                With a cache, of the last n new ones.
            num_items_in_batch: number of targets of the whole step, over accumulated batches and processes, that the
                summed loss is divided by. Defaults to the number in this batch. `Trainer` counts every label that is
                not −100, but for the first of each row.
            kwargs: `shift_labels`, and `skip_logits`: `True` returns no logits.

            The other arguments are those of `BlossomRecModel.forward`. `label_smoothing_factor` of `Trainer` replaces
            the loss, and the objective with it: its smoothing is uniform over the whole vocabulary, [PAD] and [UNK]
            included.

        Raises:
            ValueError: as `BlossomRecModel.forward`, for labels outside the vocabulary, for labels with a cache, and for
                `logits_to_keep` below 0.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None:
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        cache = past_key_values if cache is None else cache
        # No parameters of their own: `Trainer` would expect each parameter named like a label in every batch.
        shift_labels, skip_logits = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", False)
        shifted = shift_labels is not None
        labels = shift_labels if shifted else labels
        _check_keywords(kwargs, position_ids, cu_seq_lens_q)
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` is {logits_to_keep}; it must be a number of positions, 0 for all.")
        if labels is not None and (cache is not None or use_cache):
            raise ValueError("`labels` cannot be combined with a cache; a loss needs the histories themselves.")
        packed = pack_histories(
            inputs,
            attention_mask,
            position_ids,
            cu_seq_lens_q,
            max_length_q,
            self.config.vocab_size,
            labels,
            labels_are_counted=num_items_in_batch is not None and not shifted,
            cu_seqlens_k=cu_seq_lens_k,
            max_seqlen_k=max_length_k,
            drop_padding=cache is not None or bool(use_cache),
        )
        append = None
        if cache is not None or use_cache:
            append = self.model.begin_append(cache, packed, input_ids, training=self.training)
        outputs: BlossomRecModelOutput = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_selection=output_selection,
            packed=packed,
            append=append,
        )
        hidden_states = packed.pack(outputs.last_hidden_state)

        loss = logits = None
        if labels is not None:
            labels = packed.pack(labels, padding=IGNORE_INDEX).long()
            targets = given_targets(labels) if shifted else next_item_targets(labels, packed.cu_seqlens)
            loss = find_objective(self.config.objective)(
                hidden_states,
                self.item_vectors(),
                targets,
                num_items_in_batch,
                config=self.config,
                item_counts=self.item_counts,
            )
        if logits_to_keep:
            logits = self.lm_head(packed.last(hidden_states, logits_to_keep))
        elif not skip_logits and (labels is None or not self.training):
            logits = packed.unpack(self.lm_head(hidden_states))
        if append is not None and use_cache is not False:  # the last thing that can fail is done
            append.commit(hidden_states)
        return BlossomRecOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            selections=outputs.selections,
            cache=outputs.cache,
        )


def _shift_labels_of(model_class: type) -> None:
    """`Trainer` shifts the labels of a smoothed loss for the classes named in this table, and for no others."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"blossomrec/{model_class.__name__}"] = model_class.__name__


_shift_labels_of(BlossomRecForSequentialRecommendation)

__all__ = [
    "BlossomRecForSequentialRecommendation",
    "BlossomRecModel",
    "BlossomRecPreTrainedModel",
]
