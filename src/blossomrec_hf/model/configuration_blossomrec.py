"""Configuration of BlossomRec models."""

import os
import re
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .ids_blossomrec import NUM_SPECIAL_IDS, UNKNOWN_TYPE
from .manifest_blossomrec import CONFIG_NAMES, ManifestMixin, require_loadable, update_manifest
from .objectives_blossomrec import SAMPLED_OBJECTIVES, Objective, register_objective


VERSION = "0.1.0"  # of the package, which this file cannot import when it is loaded as remote code

SELECTION_GRADIENTS = ("straight_through", "none")
NEGATIVE_SAMPLINGS = ("uniform", "popularity", "in_batch")
SCORINGS = ("dot", "cosine")
CROSS_ENTROPY_IMPLEMENTATIONS = ("auto", "torch", "triton", "liger")
TIME_FEATURES = ("previous_gap", "next_gap", "next_gap_input", "hour", "weekday")
# The numbers that each `rope_type` requires, besides `rope_theta`.
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_INT32 = 2**31 - 1
_WHOLE_NUMBERS = {
    "vocab_size": (3, _INT32),  # [PAD], [UNK] and an item
    "hidden_size": (2, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 2**19),
    "num_key_value_heads": (1, 2**19),
    "intermediate_size": (1, _INT32),
    "compress_block_size": (1, _INT32),
    "compress_stride": (1, _INT32),
    "selection_block_size": (1, _INT32),
    "num_selected_blocks": (1, _INT32),
    "short_term_block_size": (1, _INT32),
    "short_term_window": (1, _INT32),
    "power_law_base": (2, _INT32),
    "max_position_embeddings": (1, _INT32),
    "num_negatives": (1, _INT32),
}
_NUMBERS = {
    "hidden_dropout_prob": (0, 1, "[0, 1)"),
    "time_dropout_prob": (0, 1, "[0, 1]"),
    "item_dropout_prob": (0, 1, "[0, 1)"),
    "id_dropout_prob": (0, 1, "[0, 1)"),
    "temperature": (0, 1000, "(0, 1000]"),
    "importance_threshold": (0, 1, "[0, 1)"),
    "gbce_calibration": (0, 1, "[0, 1]"),
    "initializer_range": (0, 1000, "[0, 1000]"),
    "layer_norm_eps": (0, 1, "[0, 1]"),
    "repeat_share": (0, 1, "[0, 1]"),
}
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
MAX_REPEAT_SHARE = 0.01  # up to this share, seen items are excluded by default


class BlossomRecConfig(ManifestMixin, PreTrainedConfig):
    r"""
    Configuration of a BlossomRec model (arXiv 2512.13368). The catalog is the vocabulary: id 0 is `[PAD]`, id 1 is `[UNK]`,
    and the items follow.

    Args:
        vocab_size (`int`, *optional*, defaults to 3418):
            Number of items plus the two special ids.
        hidden_size (`int`, *optional*, defaults to 128):
            Size of the item embedding and of the hidden states.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of query heads H. The head width `hidden_size / H` must be even.
        num_key_value_heads (`int`, *optional*, defaults to 2):
            Number of key/value heads G, a divisor of H. `None` means H.
        intermediate_size (`int`, *optional*, defaults to 256):
            Size of the hidden layer of the feed-forward network.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation function of the feed-forward network.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.3):
            Dropout probability after the embedding, the attention and the feed-forward network. There is no dropout on
            attention probabilities.
        item_dropout_prob (`float`, *optional*, defaults to 0.0):
            Share of the input items that one learned vector replaces in training. The targets stay.
        scoring (`str`, *optional*, defaults to `"dot"`):
            `"dot"` scores an item by the dot product of the last hidden state with its vector, `"cosine"` by their cosine
            similarity divided by `temperature`, in training and afterwards.
        temperature (`float`, *optional*, defaults to 0.05):
            Temperature of `"cosine"` scores.
        item_features (`dict`, *optional*):
            Features of the items, by name: `{"kind": "categories", "names": [...], "num_values": n}`, where n is the number
            of values of all items, or `{"kind": "vectors", "size": n}`. `ItemTable` describes them. An item's vector is then
            the sum of its id embedding, a learned vector per category and a projection of each dense vector.
        id_dropout_prob (`float`, *optional*, defaults to 0.1):
            With `item_features`, the probability with which the id embedding of an item is omitted in a training step, so
            that items are also known by their features alone. With a smaller probability, new items are recommended more
            often (`examples/benchmarks/cold_items.py`).
        attention_types (`str` or `list[str]`, *optional*, defaults to `"blossom"`):
            The streams of each layer: `"blossom"` (both streams of the paper with a gate), `"long_term"`, `"short_term"`,
            `"full"`, or names joined by `+`, with a gate for each. A single name applies to all layers. `"full"` in all
            layers is SASRec with rotary embeddings. Further streams are added by `register_stream`. Names are checked
            when a model is built.
        compress_block_size (`int`, *optional*, defaults to 32):
            Number of positions l that a compression window covers.
        compress_stride (`int`, *optional*, defaults to 16):
            Distance s ≤ l between the ends of two windows.
        selection_block_size (`int`, *optional*, defaults to 16):
            Number of positions b of a selection block, a multiple of s.
        num_selected_blocks (`int`, *optional*, defaults to 4):
            Number of past blocks k that each query attends to.
        importance_threshold (`float`, *optional*, defaults to 1e-10):
            Minimum probability β. Blocks with a probability of β or less are not selected.
        selection_gradient (`str`, *optional*, defaults to `"straight_through"`):
            `"straight_through"` trains the importance through the logits of the selected blocks. With `"none"`, the
            compressor keeps its initial weights, as in the authors' code.
        short_term_block_size (`int`, *optional*, defaults to 8):
            Number of positions B of a short-term block. With 8 and a window of 1, models ranked better on MovieLens-1M and
            on the built-in data set than with 1 and 8, the constants of the authors' code.
        short_term_window (`int`, *optional*, defaults to 1):
            Number of latest short-term blocks w that are attended to, including the query's own.
        power_law_base (`int`, *optional*, defaults to 2):
            Base p of the distances 1, p, p², … at which further blocks are attended to.
        gate_initial_bias (`list[float]`, *optional*, defaults to `(-2.0, 2.0)`):
            Initial biases of the long-term and the short-term gate, before the sigmoid.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the query, key, value and output projections have biases.
        rope_parameters (`dict`, *optional*):
            Parameters of the rotary embedding, as in `transformers`. `rope_theta` defaults to 10,000.
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            Original length for scaled `rope_type`s. Does not limit the length of histories.
        objective (`str` or `Callable`, *optional*, defaults to `"cross_entropy"`):
            Training loss of each position: `"cross_entropy"` (full softmax over the catalog); with sampled negatives
            `"sampled_softmax"` (with log-Q correction), `"bce"`, `"gbce"` or `"bpr"`; or another name that was given to
            `register_objective`, which is looked up when a model is built. A function is registered under its `__name__`,
            and the configuration stores the name.
        cross_entropy_implementation (`str`, *optional*, defaults to `"auto"`):
            Implementation of the full softmax: `"torch"`, `"triton"` (fused kernels that do not materialize the logits),
            `"liger"` (the fused kernel of the package liger-kernel), or `"auto"`, the fastest that supports the device,
            the dtype and the hidden size. Value and gradients are the same.
        num_negatives (`int`, *optional*, defaults to 256):
            Number of sampled negatives, at most the number of items.
        negative_sampling (`str`, *optional*, defaults to `"uniform"`):
            Distribution of negatives: `"uniform"`, `"popularity"` or `"in_batch"` (targets of other positions).
        shared_negatives (`bool`, *optional*, defaults to `True`):
            Whether all positions of a batch share the same negatives.
        gbce_calibration (`float`, *optional*, defaults to 0.75):
            Calibration t of gBCE, from 0 (BCE) to 1 (fully calibrated).
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the layer norms.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the output embedding is the item embedding.
        time_features (`list[str]`, *optional*):
            What the model reads of the `timestamps` of events, in any combination. The gaps are sorted into buckets, 1.3
            per octave of seconds, with a learned vector each. All vectors start at zero, where a feature changes nothing.

            - `"previous_gap"`: the time since the previous event, added to the event's input.
            - `"next_gap"`: the time to the next event or, at the last one, to `prediction_time` ("now"), as a scale and a
              shift of the last hidden state. A cache does not depend on it.
            - `"next_gap_input"`: the same time, added to the event's input. A cache then computes its latest event again
              when the next one is appended.
            - `"hour"`, `"weekday"`: the hour of the day and the day of the week in `time_zone`, of the event, added to its
              input, and of the next event or "now", as a scale and a shift of the last hidden state.
        time_zone (`str`, *optional*, defaults to `"UTC"`):
            IANA name of the time zone of `"hour"` and `"weekday"`, such as `"Europe/Berlin"`. Daylight saving time is
            respected: the changes of the zone's offset up to the year 2100 are stored with the model.
        time_dropout_prob (`float`, *optional*, defaults to 0.1):
            Share of the positions at which, in training, the time and the type of the next event are unknown, so that the
            model also predicts without them.
        event_types (`list[str]`, *optional*):
            Names of the event types, in the order of `event_type_ids`. Each type has a learned vector, added to the input of
            its events; an unknown type (−1) has one of its own. The type to be predicted scales and shifts the last
            hidden state.
        target_event_types (`list[str]`, *optional*):
            The types that are predicted, some of `event_types`. If no `target_event_type` is given, the first of them is
            predicted. `None` means all types; the type to be predicted is then unknown by default.
        repeat_share (`float`, *optional*):
            Share of the test items in the training log that occur earlier in their user's history. Up to 0.01,
            `recommend`, evaluation and early stopping exclude seen items by default; above, they exclude none. `None` means
            that it was not measured: `recommend` excludes seen items, and evaluation measures the share.
        blossomrec_version (`str`, *optional*):
            Version of this package that saved the configuration. Configurations of newer versions are refused.

    Raises:
        ValueError: If a value is not valid; the message names the argument and the valid values.
    """

    model_type = "blossomrec"
    default_theta = 10000.0
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "selections", "cache"]

    vocab_size: int = 3418
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 2
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.3
    item_dropout_prob: float = 0.0
    scoring: str = "dot"
    temperature: float = 0.05
    item_features: dict[str, dict[str, Any]] | None = None
    id_dropout_prob: float = 0.1
    attention_types: str | list[str] = "blossom"
    compress_block_size: int = 32
    compress_stride: int = 16
    selection_block_size: int = 16
    num_selected_blocks: int = 4
    importance_threshold: float = 1e-10
    selection_gradient: str = "straight_through"
    short_term_block_size: int = 8
    short_term_window: int = 1
    power_law_base: int = 2
    gate_initial_bias: list[float] | tuple[float, float] = (-2.0, 2.0)
    attention_bias: bool = False
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    objective: str | Objective = "cross_entropy"
    cross_entropy_implementation: str = "auto"
    num_negatives: int = 256
    negative_sampling: str = "uniform"
    shared_negatives: bool = True
    gbce_calibration: float = 0.75
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    tie_word_embeddings: bool = True
    time_features: list[str] | tuple[str, ...] | None = None
    time_zone: str = "UTC"
    time_dropout_prob: float = 0.1
    event_types: list[str] | tuple[str, ...] | None = None
    target_event_types: list[str] | tuple[str, ...] | None = None
    repeat_share: float | None = None
    blossomrec_version: str | None = None
    pad_token_id: int | None = 0
    unk_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs) -> None:
        self._check_types()
        if _is_newer(self.blossomrec_version, VERSION):
            raise ValueError(
                f"This checkpoint was saved by blossomrec-hf {self.blossomrec_version}, but {VERSION} is installed: run "
                "`pip install -U blossomrec-hf`, or load it with `trust_remote_code=True`, which uses its own code."
            )
        self.blossomrec_version = VERSION
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if isinstance(self.attention_types, str):
            self.attention_types = [self.attention_types] * self.num_hidden_layers
        self.attention_types = list(self.attention_types)
        self.gate_initial_bias = list(self.gate_initial_bias)
        for name in ("time_features", "event_types", "target_event_types"):
            if isinstance(names := getattr(self, name), list | tuple):
                setattr(self, name, list(names) or None)
        if isinstance(self.time_features, list):
            # In one order, so that equal features make equal configurations. `check` reports unknown ones.
            self.time_features.sort(key=(*TIME_FEATURES, *self.time_features).index)
        # A copy, because `transformers` completes it in place.
        self.rope_parameters = dict(self.rope_parameters or {})
        if not type(self).__module__.startswith("transformers_modules."):
            # The package registers its own pipeline. `transformers` would refuse to continue without permission to run
            # the checkpoint's code.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "BlossomRecConfig":
        """
        As in `transformers`.

        Raises:
            ValueError: If the file is damaged, or a value is not valid.
            OSError: If there is no such file, or it is no JSON.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(
                f"The configuration of {os.fspath(pretrained_model_name_or_path)} is damaged ({type(error).__name__}: "
                f"{error}); download it with `force_download=True`, or save the model again."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        As in `transformers`; also writes the hash of the file to the manifest of the folder.

        Raises:
            ValueError: If the class is defined in a script, a notebook or a function.
        """
        require_loadable(type(self))
        super().save_pretrained(save_directory, **kwargs)
        self._write_manifest(save_directory)

    def _write_manifest(self, folder: str | os.PathLike) -> None:
        """Write the hash of the configuration to the manifest of `folder`."""
        update_manifest(folder, CONFIG_NAMES)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "objective" and callable(value):  # the configuration is JSON
            own_name = getattr(value, "__name__", None)
            if own_name is None or not own_name.isidentifier():
                raise ValueError(
                    f"`objective` is {_short(value)}, which has no name to save; call `register_objective('hinge', function)` "
                    "and pass the name."
                )
            value = register_objective(own_name, value)
        super().__setattr__(name, value)

    @property
    def num_items(self) -> int:
        """The number of items: the vocabulary without `[PAD]` and `[UNK]`."""
        return self.vocab_size - NUM_SPECIAL_IDS

    @property
    def head_dim(self) -> int:
        """Width of a head, `hidden_size / num_attention_heads`."""
        return self.hidden_size // self.num_attention_heads

    @property
    def default_target_type(self) -> int:
        """The id of the event type that is predicted if none is given; −1, unknown, without `target_event_types`."""
        return self.event_types.index(self.target_event_types[0]) if self.target_event_types else UNKNOWN_TYPE

    @property
    def event_columns(self) -> tuple[str, ...]:
        """The columns of the events that the model reads besides `input_ids`: `timestamps`, `event_type_ids`, both or none."""
        features = {"timestamps": self.time_features, "event_type_ids": self.event_types}
        return tuple(name for name, feature in features.items() if feature)

    @property
    def uses_now(self) -> bool:
        """Whether the prediction depends on `prediction_time` ("now")."""
        return any(name != "previous_gap" for name in self.time_features or ())

    @property
    def exclude_seen(self) -> bool:
        """Whether items of the history are excluded from recommendations by default, see `repeat_share`."""
        return self.repeat_share is None or self.repeat_share <= MAX_REPEAT_SHARE

    def _check_types(self) -> None:
        """Check the types and ranges of single values, which a damaged or edited config.json can violate."""
        for name, (least, most) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if name == "num_key_value_heads" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"`{name}` is {_short(value)}; it must be an integer from {least} to {most}.")
        for name, (least, most, interval) in _NUMBERS.items():
            value = getattr(self, name)
            if name == "repeat_share" and value is None:
                continue
            inside = _is_number(value) and least <= value <= most
            if not inside or (value == least and interval[0] == "(") or (value == most and interval[-1] == ")"):
                raise ValueError(f"`{name}` is {_short(value)}; it must be a number in {interval}.")
        for name in ("attention_bias", "shared_negatives", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {_short(getattr(self, name))}; it must be True or False.")
        biases = self.gate_initial_bias
        if not isinstance(biases, list | tuple) or len(biases) != 2 or not all(map(_is_number, biases)):
            raise ValueError(
                f"`gate_initial_bias` is {_short(biases)}; it must be two numbers, for the long-term and the short-term gate."
            )
        if not isinstance(self.attention_types, str | list | tuple):
            raise ValueError(
                f"`attention_types` is {_short(self.attention_types)}; it must be a name or a list of names."
            )
        _check_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        dtype = self.dtype
        if not (dtype is None or isinstance(dtype, torch.dtype) or (isinstance(dtype, str) and dtype in _DTYPES)):
            raise ValueError(f"`dtype` is {_short(dtype)}; it must be one of {', '.join(map(repr, _DTYPES))}.")
        if not isinstance(self.blossomrec_version, str | None):
            raise ValueError(
                f"`blossomrec_version` is {_short(self.blossomrec_version)}; it must be a string such as '0.1.0'."
            )
        self._check_events()
        self._check_rope()

    def _check_events(self) -> None:
        for name in ("time_features", "event_types", "target_event_types"):
            names = getattr(self, name)
            if names is not None and not (
                isinstance(names, list | tuple)
                and all(isinstance(entry, str) for entry in names)
                and len(set(names)) == len(names)
            ):
                raise ValueError(f"`{name}` is {_short(names)}; it must be a list of different names, or None.")
        for name in self.time_features or ():
            _check_choice("time_features", name, TIME_FEATURES)
        for name in self.target_event_types or ():
            if name not in (self.event_types or ()):
                raise ValueError(
                    f"`target_event_types` has {_short(name)}, which is not among `event_types` ({self.event_types}); "
                    "name all types of the log there."
                )
        if not isinstance(self.time_zone, str) or not self.time_zone:
            raise ValueError(
                f"`time_zone` is {_short(self.time_zone)}; it must be an IANA name such as 'Europe/Berlin'."
            )

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if rope is None:
            return
        if not isinstance(rope, dict):
            raise ValueError(f"`rope_parameters` is {_short(rope)}; it must be a dictionary or None.")
        kind = rope.get("rope_type", "default")
        _check_choice("rope_parameters['rope_type']", kind, tuple(_ROPE_NUMBERS))
        for name in ("rope_theta", *_ROPE_NUMBERS[kind]):
            value = rope.get(name, self.default_theta if name == "rope_theta" else None)
            if not _is_number(value) or value <= 0:
                raise ValueError(f"`rope_parameters[{name!r}]` is {_short(value)}; it must be a number above 0.")

    def check(self) -> None:
        """Raise `ValueError` if a value is not valid; the message names the argument and the valid values."""
        self._check_types()
        _check_choice("model_type", self.model_type, (type(self).model_type,))
        special = (self.pad_token_id, self.unk_token_id)
        if special != (0, 1) or not all(type(token_id) is int for token_id in special):
            raise ValueError(
                f"`pad_token_id` and `unk_token_id` are {self.pad_token_id!r} and {self.unk_token_id!r}; they must be 0 and 1."
            )
        self._check_heads()
        self._check_blocks()
        if len(self.attention_types) != self.num_hidden_layers:
            raise ValueError(
                f"`attention_types` has {len(self.attention_types)} names, but `num_hidden_layers` is "
                f"{self.num_hidden_layers}; give one name for all layers or one per layer."
            )
        for attention_type in self.attention_types:
            if not isinstance(attention_type, str):  # the names are looked up when a model is built
                raise ValueError(
                    f"`attention_types` has {_short(attention_type)}; it must be a name or a list of names."
                )
        self._check_objective()
        _check_choice("scoring", self.scoring, SCORINGS)
        self._check_item_features()

    def _check_item_features(self) -> None:
        if self.item_features is None:
            return
        if not isinstance(self.item_features, dict) or not self.item_features:
            raise ValueError(
                f"`item_features` is {_short(self.item_features)}; it must be a dictionary of features by name, or None."
            )
        for name, feature in self.item_features.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"`item_features` names a feature {_short(name)}; names must be identifiers.")
            feature = feature if isinstance(feature, dict) else {}
            names, kind = feature.get("names"), feature.get("kind")
            numbers = [feature.get("num_values" if kind == "categories" else "size")]
            if kind == "categories":
                sound = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
                sound, least = sound and len(set(names)) == len(names), 0
            else:
                sound, least = kind == "vectors", 1
            if not sound or not all(type(number) is int and least <= number <= _INT32 for number in numbers):
                raise ValueError(
                    f'`item_features[{name!r}]` is {_short(self.item_features[name])}; it must have the "kind" '
                    '"categories" with different "names" and "num_values", or "vectors" with "size".'
                )
        if not self.tie_word_embeddings:
            raise ValueError(
                "`tie_word_embeddings` is False; with `item_features`, input and scores share the item vectors, and it must "
                "be True."
            )

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}; it must be an even multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` is {self.num_attention_heads}; it must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )

    def _check_blocks(self) -> None:
        if self.compress_block_size < self.compress_stride:
            raise ValueError(
                f"`compress_block_size` is {self.compress_block_size}; it must be at least `compress_stride` "
                f"({self.compress_stride}), because positions between two windows would be ignored otherwise."
            )
        if self.selection_block_size % self.compress_stride:
            raise ValueError(
                f"`selection_block_size` is {self.selection_block_size}; it must be a multiple of `compress_stride` "
                f"({self.compress_stride})."
            )
        _check_choice("selection_gradient", self.selection_gradient, SELECTION_GRADIENTS)

    def _check_objective(self) -> None:
        if not isinstance(self.objective, str):
            raise ValueError(
                f"`objective` is {_short(self.objective)}; it must be the name of an objective, or a function."
            )
        _check_choice("cross_entropy_implementation", self.cross_entropy_implementation, CROSS_ENTROPY_IMPLEMENTATIONS)
        _check_choice("negative_sampling", self.negative_sampling, NEGATIVE_SAMPLINGS)
        if self.objective in SAMPLED_OBJECTIVES and not 1 <= self.num_negatives <= self.num_items:
            raise ValueError(
                f"`num_negatives` is {self.num_negatives!r}; it must be from 1 to {self.num_items}, the number of items."
            )


def _is_newer(saved: str | None, here: str) -> bool:
    """Whether the version `saved` is newer than `here`, ignoring the patch number."""
    numbers = [re.findall(r"\d+", version)[:2] for version in (saved or "0", here)]
    return [int(number) for number in numbers[0]] > [int(number) for number in numbers[1]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` is {_short(value)}; it must be one of {', '.join(map(repr, choices))}.")


__all__ = ["BlossomRecConfig"]
