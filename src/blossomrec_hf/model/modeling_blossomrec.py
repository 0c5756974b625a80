"""BlossomRec as a model of `transformers`: an item-id sequence in, scores over the catalog out."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .append_blossomrec import Append
from .attention_blossomrec import BlossomAttention
from .cache_blossomrec import BlossomRecCache
from .configuration_blossomrec import BlossomRecConfig
from .events_blossomrec import INPUT_FEATURES, PREDICTION_FEATURES, EventVectors, Moments, check_moments, read_moments
from .features_blossomrec import FeatureVectors
from .ids_blossomrec import IGNORE_INDEX, UNKNOWN_TIME, UNKNOWN_TYPE
from .items_blossomrec import ItemScoresMixin, ItemVectorsMixin, KeptMatrix, unit_vectors
from .loss_blossomrec import find_targets, loss_of_targets
from .modules_blossomrec import ItemEmbedding, LogStatistics, check_inference
from .objectives_blossomrec import find_objective
from .outputs_blossomrec import BlossomRecModelOutput, BlossomRecOutput, LayerOutputs, LayerSelection
from .packing_blossomrec import PackedHistories, check_keywords, pack_histories, pop_packing, values_are_known
from .power_law_blossomrec import power_law_attention_forward  # noqa: F401  (registers "power_law")
from .pretrained_blossomrec import BlossomRecPreTrainedModel, NoGenerationMixin
from .recommendation_blossomrec import RecommendationMixin
from .static_blossomrec import StaticEncoder


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


class BlossomRecModel(ItemVectorsMixin, BlossomRecPreTrainedModel):
    """Item embedding and layers: item ids in, hidden states out."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        embedding = nn.Embedding if config.item_features is None else ItemEmbedding
        self.item_embedding = embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.item_features = None if config.item_features is None else FeatureVectors(config)
        self._all_vectors = KeptMatrix()  # with features
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        if config.item_dropout_prob > 0:
            self.replaced_item = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList([BlossomRecLayer(config, i) for i in range(config.num_hidden_layers)])
        self.log_statistics = LogStatistics(config.vocab_size, with_times=bool(config.time_features))
        event_vectors = EventVectors(config, INPUT_FEATURES, config.hidden_size)
        self.event_vectors = event_vectors if event_vectors.features else None
        prediction_vectors = EventVectors(config, PREDICTION_FEATURES, 2 * config.hidden_size)
        self.prediction_vectors = prediction_vectors if prediction_vectors.features else None
        self.gradient_checkpointing = False
        self._static_encoders: list[StaticEncoder] = []  # of `compile_for_inference`
        self.post_init()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_static_encoders": []}  # neither copied nor pickled

    @property
    def item_counts(self) -> torch.Tensor:
        """How often each vocabulary id occurs in the training data, `[vocab_size]` int64; saved with the model."""
        return self.log_statistics.item_counts

    @property
    def latest_time(self) -> torch.Tensor:
        """The time of the latest event of the training data, seconds; only with `config.time_features`."""
        return self.log_statistics.latest_time

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

    def encode(
        self,
        histories: PackedHistories,
        *,
        last_only: bool = False,
        cache: BlossomRecCache | None = None,
        use_cache: bool = True,
        training: bool = False,
        layer_outputs: LayerOutputs | None = None,
        item_vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Compute the prediction states of packed histories, which are compared with item vectors: the one entry point of
        `forward`, `recommend`, evaluation and serving. Nothing in it depends on values, so that
        `torch.compile(model.encode)` has no graph break (without a cache).

        Args:
            histories: what `pack_histories` returns. Every column of the events enters the model here.
            last_only: return the states of each history's last position alone. Without a cache, the last layer computes
                only keys and values of the others. With one, the last event of a history without new events is a cached one.
            cache: cached histories; if given, `histories` contains only their new events, which are appended.
                No gradients are computed.
            use_cache: `False` leaves `cache` as it was.
            training: whether dropout is applied, also to items and to times and types of the next events. It does not depend
                on the modules' mode, so that threads may share a model.
            layer_outputs: the lists in it that are not `None` get the outputs of every layer.
            item_vectors: with `config.item_features`, the result of `item_vectors`, if it is known.

        Returns:
            `[T, hidden_size]`; with `last_only`, `[S, hidden_size]`, where the row of an empty history has no meaning.

        Raises:
            ValueError: for times or types that are missing, go backwards, are in another unit than seconds or outside of
                `config.event_types` (see `check_moments`); for a cache in training mode, and for one that does not fit the
                model or the histories, which is left as it was.
        """
        hidden_states, moments = self.run_layers(
            histories, last_only, cache, use_cache, training, layer_outputs, item_vectors
        )
        return self.prediction_states(hidden_states, moments.time, moments.next_time, moments.next_type)

    def encode_targets(
        self, histories: PackedHistories, sources: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `encode`, and the prediction states of the events of baskets: that of event t comes from position `sources[t]` `[T]`,
        for the type of the event itself. Both are `[T, hidden_size]`; `options` are those of `encode`.
        """
        hidden_states, moments = self.run_layers(histories, **options)
        states = self.prediction_states(hidden_states, moments.time, moments.next_time, moments.next_type)
        if moments.event_type is None:
            return states, states[sources]
        before = moments.map(lambda x: x[sources])
        types = torch.where(before.next_type == UNKNOWN_TYPE, UNKNOWN_TYPE, moments.event_type)
        return states, self.prediction_states(hidden_states[sources], before.time, before.next_time, types)

    def prediction_states(
        self,
        hidden_states: torch.Tensor,
        timestamps: torch.Tensor | None = None,
        prediction_time: torch.Tensor | None = None,
        target_event_type: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The states that are compared with item vectors. The time since the event, the hour and the day of the week "now" and
        the type to be predicted scale and shift the hidden states, if `config` has these features. With `scoring="cosine"`,
        the states are then scaled to length 1 and divided by the temperature (computed in float32 or better).

        Args:
            hidden_states: `[..., hidden_size]`, of the last layer, such as `BlossomRecCache.last_hidden_state`.
            timestamps: times of the events of these states in seconds, int64 `[...]`, such as
                `BlossomRecCache.last_timestamps`. Without `prediction_time`, they are not needed.
            prediction_time: times of the next events ("now"), int64 `[...]`. Defaults to unknown (`UNKNOWN_TIME`).
            target_event_type: types of the next events, int64 `[...]`, −1 if unknown. Defaults to
                `config.default_target_type`.

        Raises:
            ValueError: for a `prediction_time` without `timestamps`.
        """
        if self.prediction_vectors is not None:
            place = hidden_states[..., 0]
            if prediction_time is None:
                prediction_time = torch.full_like(place, UNKNOWN_TIME, dtype=torch.long)
            elif timestamps is None and self.config.time_features:
                raise ValueError("`timestamps` is None; give the time of each state's event with `prediction_time`.")
            if target_event_type is None:
                target_event_type = torch.full_like(place, self.config.default_target_type, dtype=torch.long)
            timestamps = prediction_time if timestamps is None else timestamps
            moments = Moments(time=timestamps, next_time=prediction_time, next_type=target_event_type)
            scale, shift = self.prediction_vectors(moments).to(hidden_states.dtype).chunk(2, -1)
            hidden_states = hidden_states * (1 + scale) + shift
        if self.config.scoring == "dot":
            return hidden_states
        return unit_vectors(hidden_states, scale=1 / self.config.temperature)

    def run_layers(
        self,
        histories: PackedHistories,
        last_only: bool = False,
        cache: BlossomRecCache | None = None,
        use_cache: bool = True,
        training: bool = False,
        layer_outputs: LayerOutputs | None = None,
        item_vectors: torch.Tensor | None = None,
        compiled: bool = True,
    ) -> tuple[torch.Tensor, Moments]:
        """
        The last layer's hidden states, of which `encode` makes prediction states, and their moments; the arguments are
        those of `encode`, and whether what `compile_for_inference` compiled may be used.
        """
        compiled &= last_only and cache is None and layer_outputs is None and not (training or torch.is_grad_enabled())
        for encoder in self._static_encoders if compiled else ():
            if encoder.has_room(histories):
                moments = self._moments(histories, training)  # checks the values, which compiled code does not
                last = (histories.ends - 1).clamp(min=0)
                return encoder(histories), moments.map(lambda x: x[last])
        append = None if cache is None else self._begin_append(cache, histories, training)
        events = histories if append is None else append.events
        moments = self._moments(events, training)
        position = histories.position if append is None else append.position
        keep = None
        # Padding inside a history stands behind its last item.
        if last_only and append is None and layer_outputs is None and position.shape[0] and histories.lengths is None:
            one = histories.cu_seqlens.shape[0] == 2 and not torch.compiler.is_compiling()
            keep = slice(-1, None) if one else (histories.ends - 1).clamp(min=0)
        records = layer_outputs or LayerOutputs()
        with torch.set_grad_enabled(torch.is_grad_enabled() and append is None):
            hidden_states = self._embed(events, moments, training, item_vectors)
            position_embeddings = self.rotary_embedding(position, hidden_states.dtype)
            for layer in self.layers:
                hidden_states = records.keep_hidden_states(histories, hidden_states, append)
                hidden_states, selection, gates, probs = layer(
                    hidden_states,
                    training=training,
                    keep=keep if layer is self.layers[-1] else None,
                    position_embeddings=position_embeddings,
                    cu_seqlens=events.cu_seqlens,
                    max_seqlen=events.max_seqlen,
                    output_attentions=records.attentions is not None,
                    append=append,
                )
                if records.attentions is not None:
                    records.attentions.append(histories.unpack_pairs(probs))
                if records.selections is not None:
                    records.selections.append(LayerSelection.of_layer(histories, selection, gates, append))
            hidden_states = records.keep_hidden_states(histories, hidden_states, append)[0]
            hidden_states = hidden_states.to(events.cu_seqlens.device)  # layers may be on several devices
        if append is None:
            if keep is not None:
                moments = moments.map(lambda x: x[keep])
            elif last_only:
                hidden_states = histories.last(hidden_states, 1)[:, 0]
                moments = moments.map(lambda x: histories.last(x, 1)[:, 0])
            return hidden_states, moments
        last, last_length = append.last_states(hidden_states)
        if last_only:
            cache.check_last(append.lengths, last_length)
            hidden_states, moments = last, append.last_moments()
            self.check_moments(moments)
        else:
            hidden_states, moments = append.of_new(hidden_states), moments.map(append.of_new)
        if use_cache:
            append.commit(last, last_length)
        return hidden_states, moments

    def _moments(self, events: PackedHistories, training: bool) -> Moments:
        """When the events and the next ones happened, and of what type they are, as far as the model reads it."""
        moments = read_moments(events, self.config, training)
        self.check_moments(moments)
        return moments

    def check_moments(self, moments: Moments) -> None:
        """Raise `ValueError` for times and types that are not possible; values are not read inside a compiled graph."""
        config = self.config
        if (config.time_features or config.event_types) and values_are_known(self.item_counts):
            check_moments(moments, config, self.latest_time if config.time_features else None)

    def _embed(
        self,
        histories: PackedHistories,
        moments: Moments,
        training: bool,
        item_vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The input of the first layer `[1, T, hidden_size]`, from the columns of the events."""
        x = histories.inputs_embeds
        if x is None:
            x = self.look_up(histories.item_ids, training, item_vectors)  # NEFTune's noise depends on the shape
        x = histories.pack(x)
        if training and self.config.item_dropout_prob > 0:
            replaced = torch.rand(x.shape[0], 1, device=x.device) < self.config.item_dropout_prob
            x = torch.where(replaced, self.replaced_item, x)
        if self.event_vectors is not None:
            x = x + self.event_vectors(moments)
        return self.dropout(self.embedding_norm(x), training)[None]

    def _begin_append(self, cache: BlossomRecCache, histories: PackedHistories, training: bool) -> Append:
        """The new events `histories` of the cached ones."""
        if training:
            raise ValueError("A cache works in evaluation mode; call `model.eval()`, or omit `cache`.")
        check_inference(self)
        weights = cache.check_model(self)
        return Append(cache, histories, weights)

    def cache_for(self, cache: Any, use_cache: bool | None = None) -> BlossomRecCache | None:
        """The given cache, a new one if `use_cache` is `True` and none is given, or `None`."""
        if cache is None:
            return BlossomRecCache(self.config) if use_cache else None
        if not isinstance(cache, BlossomRecCache):
            raise ValueError(
                f"`cache` is a {type(cache).__name__}; it must be a `BlossomRecCache`, which "
                "`use_cache=True` alone creates."
            )
        return cache

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: BlossomRecCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_selection: bool | None = None,
        timestamps: torch.LongTensor | None = None,
        event_type_ids: torch.LongTensor | None = None,
        prediction_time: torch.LongTensor | int | None = None,
        target_event_type: torch.LongTensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BlossomRecModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor`): vocabulary ids `[B, L]`, padded on any side, or packed `[1, T]`.
            attention_mask (`torch.Tensor`, *optional*): `[B, L]`, 0 at padding. By default, [PAD] ids are padding.
            position_ids (`torch.LongTensor`, *optional*): `[B, L]`; positions that restart at 0 in a single row mark packed
                histories.
            cache (`BlossomRecCache`, *optional*): Cached histories; if given, the inputs contain only new events,
                and the outputs are those of the new events. Requires evaluation mode, and computes no gradients.
                `position_ids` count the new events from 0.
            inputs_embeds (`torch.FloatTensor`, *optional*): `[B, L, hidden_size]` in place of `input_ids`.
            use_cache (`bool`, *optional*): `True` creates a cache if none is given; `False` does not append to the given
                one. Defaults to `True` if a cache is given.
            output_hidden_states (`bool`, *optional*): also return the embedding and the output of every layer.
            output_attentions (`bool`, *optional*): also return the attention probabilities; requires
                `attn_implementation="eager"`.
            output_selection (`bool`, *optional*): also return the selected blocks and the gates of every layer.
            timestamps (`torch.LongTensor`, *optional*): times of the events in seconds, `[B, L]` int64, never falling inside
                a history. Required with `config.time_features`, and ignored by models without, so that both kinds train on
                one data set.
            event_type_ids (`torch.LongTensor`, *optional*): types of the events, `[B, L]`: indices of `config.event_types`,
                or −1 for an unknown one. Required with `config.event_types`, and ignored by models without.
            prediction_time (`torch.LongTensor` or `int`, *optional*): time of the event to be predicted ("now") in seconds,
                `[B]`, or one per packed history. Defaults to unknown. At the other positions, it is the time of the next
                event.
            target_event_type (`torch.LongTensor` or `int`, *optional*): type of the event to be predicted, as
                `prediction_time`. Defaults to the first of `config.target_event_types`, or to unknown (−1).
            kwargs: `cu_seq_lens_q` `[S + 1]` and `max_length_q`, the offsets and the longest length of packed histories;
                `cu_seq_lens_k` and `max_length_k`, which must be the same.

        Raises:
            ValueError: for ids outside the vocabulary, for offsets or positions that do not describe the input, for times
                and types as in `encode`, for attentions of an implementation that has none, for a cache that does not fit the model or the input (it is
                left as it was), and for unknown keywords.
        """
        packing = pop_packing(kwargs)
        check_keywords(kwargs, position_ids, packing)
        cache = self.cache_for(cache, use_cache)
        histories = pack_histories(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            vocab_size=self.config.vocab_size,
            timestamps=timestamps,
            event_type_ids=event_type_ids,
            prediction_time=prediction_time,
            target_event_type=target_event_type,
            drop_padding=cache is not None,
            **packing,
        )
        records = LayerOutputs.requested(self.config, output_hidden_states, output_attentions, output_selection, cache)
        hidden_states, _ = self.run_layers(
            histories,
            cache=cache,
            use_cache=use_cache is not False,
            training=self.training,
            layer_outputs=records,
        )
        fields = {} if records is None else records.fields()
        if fields.get("hidden_states"):
            last_hidden_state = fields["hidden_states"][-1]
        else:
            last_hidden_state = histories.unpack(hidden_states)
        return BlossomRecModelOutput(last_hidden_state=last_hidden_state, cache=cache, **fields)


class LossKwargs(TransformersKwargs, total=False):
    """Keywords of `BlossomRecForSequentialRecommendation.forward`, see there."""

    shift_labels: torch.LongTensor | None
    skip_logits: bool
    basket_starts: torch.BoolTensor | None
    weights: torch.FloatTensor | None


class BlossomRecForSequentialRecommendation(
    NoGenerationMixin, RecommendationMixin, ItemScoresMixin, BlossomRecPreTrainedModel
):
    """BlossomRec with scores over the catalog: next-item training, evaluation and recommendation."""

    _tied_weights_keys = {"lm_head.weight": "model.item_embedding.weight"}

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        find_objective(config.objective)
        self.loss_type = "ForCausalLM"  # `Trainer` then leaves the first label of each row out of its count of targets
        self.model = BlossomRecModel(config)
        self.lm_head = None
        if config.item_features is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:  # item vectors are no weight that a linear layer could share
            self._tied_weights_keys = {}
        self._unit_vectors = KeptMatrix()
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _shift_labels_of(cls)

    @property
    def item_counts(self) -> torch.Tensor:
        """How often each vocabulary id occurs in the training data, `[vocab_size]` int64; saved with the model."""
        return self.model.item_counts

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear | None) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: BlossomRecCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_selection: bool | None = None,
        timestamps: torch.LongTensor | None = None,
        event_type_ids: torch.LongTensor | None = None,
        prediction_time: torch.LongTensor | int | None = None,
        target_event_type: torch.LongTensor | int | None = None,
        **kwargs: Unpack[LossKwargs],
    ) -> BlossomRecOutput:
        """
        Args:
            labels (`torch.LongTensor`, *optional*): vocabulary ids `[B, L]` aligned with the input and shifted inside:
                every position predicts the next item of its history. −100, [PAD] and [UNK] are no targets.
            logits_to_keep (`int`, *optional*): n > 0 returns the logits of the last n real positions of each history
                alone, `[S, n, vocab_size]` (S rows, or packed histories), zero before a history's first. The loss is not
                affected. With a cache, of the last n new events. Defaults to 0, all positions.
            kwargs: as in `BlossomRecModel.forward`, and

                - `num_items_in_batch`: the number of targets of the whole step, over accumulated batches and processes,
                  by which the summed loss is divided. Defaults to the number in this batch. `Trainer` counts every label
                  that is not −100, except the first of each row.
                - `shift_labels` `[B, L]`: the target of every position, instead of `labels`.
                - `basket_starts` bool `[B, L]`: whether an event is the first of a basket. The items of a basket are all
                  predicted from the last position before it, and those of a history's first basket are no targets. Only
                  the loss depends on it. By default, every event is a basket.
                - `weights` float `[B, L]`: the weight in the loss of each event as a target, 0 or more, aligned with the
                  labels. `num_items_in_batch` counts targets, whatever their weights. Defaults to 1.
                - `skip_logits`: `True` returns no logits.

            The other arguments are those of `BlossomRecModel.forward`. `label_smoothing_factor` of `Trainer` replaces
            the loss, and the objective with it: its smoothing is uniform over the whole vocabulary, [PAD] and [UNK]
            included.

        Raises:
            ValueError: as `BlossomRecModel.forward`, for labels outside the vocabulary, for labels with a cache, and for
                `logits_to_keep` below 0.
        """
        # No parameters of their own: `Trainer` would expect each parameter named like a label in every batch.
        shift_labels, skip_logits = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", False)
        num_items_in_batch, packing = kwargs.pop("num_items_in_batch", None), pop_packing(kwargs)
        basket_starts, weights = kwargs.pop("basket_starts", None), kwargs.pop("weights", None)
        shifted = shift_labels is not None
        labels = shift_labels if shifted else labels
        if shifted and basket_starts is not None:
            raise ValueError("`basket_starts` cannot be combined with `shift_labels`; give `labels`.")
        check_keywords(kwargs, position_ids, packing)
        if isinstance(logits_to_keep, torch.Tensor | float) or logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` is {logits_to_keep}; it must be a number of positions, 0 for all.")
        cache = self.model.cache_for(cache, use_cache)
        if labels is not None and cache is not None:
            raise ValueError("`labels` cannot be combined with a cache; a loss needs the histories themselves.")
        histories = pack_histories(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            vocab_size=self.config.vocab_size,
            labels=labels,
            basket_starts=basket_starts,
            weights=weights,
            labels_are_counted=num_items_in_batch is not None and not shifted,
            timestamps=timestamps,
            event_type_ids=event_type_ids,
            prediction_time=prediction_time,
            target_event_type=target_event_type,
            drop_padding=cache is not None,
            **packing,
        )
        records = LayerOutputs.requested(self.config, output_hidden_states, output_attentions, output_selection, cache)
        loss = logits = vectors = targets = None
        if labels is not None:
            targets = find_targets(
                histories.pack(labels, padding=IGNORE_INDEX).long(),
                histories.cu_seqlens,
                basket_starts=None if basket_starts is None else histories.pack(basket_starts),
                weights=None if weights is None else histories.pack(weights),
                shifted=shifted,
            )
        if self.model.item_features is not None:
            vectors = self.model.item_vectors(training=self.training)  # the same for input and scores
        with nullcontext() if cache is None else cache.all_or_nothing():
            options = {
                "cache": cache,
                "use_cache": use_cache is not False,
                "training": self.training,
                "layer_outputs": records,
                "item_vectors": vectors,
            }
            # The last layer then computes one position per history.
            last_alone = logits_to_keep == 1 and targets is None and cache is None and records is None
            last_alone = last_alone and not self.training
            if last_alone:
                hidden_states = self.model.encode(histories, last_only=True, **options)
                empty = histories.ends == histories.cu_seqlens[:-1]
                hidden_states = hidden_states.masked_fill(empty[:, None], 0)[:, None]
            elif targets is None or targets.sources is None:
                hidden_states = of_targets = self.model.encode(histories, **options)
            else:
                hidden_states, of_targets = self.model.encode_targets(histories, targets.sources, **options)
            if targets is not None:
                loss = loss_of_targets(
                    of_targets,
                    self.item_vectors(input_vectors=vectors),
                    targets,
                    num_items_in_batch,
                    config=self.config,
                    item_counts=self.item_counts,
                )
            if logits_to_keep:
                kept = hidden_states if last_alone else histories.last(hidden_states, logits_to_keep)
                logits = self.logits(kept, vectors)
            elif not skip_logits and (labels is None or not self.training):
                logits = histories.unpack(self.logits(hidden_states, vectors))
        return BlossomRecOutput(loss=loss, logits=logits, cache=cache, **({} if records is None else records.fields()))


def _shift_labels_of(model_class: type) -> None:
    """`Trainer` shifts the labels of a smoothed loss for the classes named in this table, and for no others."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"blossomrec/{model_class.__name__}"] = model_class.__name__


_shift_labels_of(BlossomRecForSequentialRecommendation)

__all__ = [
    "BlossomRecForSequentialRecommendation",
    "BlossomRecModel",
    "BlossomRecPreTrainedModel",
]
