"""Configuration of BlossomRec models."""

import os
import re
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .ids_blossomrec import NUM_SPECIAL_IDS
from .manifest_blossomrec import CONFIG_NAMES, ManifestMixin, require_loadable, update_manifest
from .objectives_blossomrec import SAMPLED_OBJECTIVES, Objective, register_objective


VERSION = "0.1.0"  # that of the package, which this file cannot import where it travels with a checkpoint

SELECTION_GRADIENTS = ("straight_through", "none")
NEGATIVE_SAMPLINGS = ("uniform", "popularity", "in_batch")
CROSS_ENTROPY_IMPLEMENTATIONS = ("auto", "torch", "triton", "liger")
# The numbers that a `rope_type` needs, in addition to `rope_theta`.
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
    "importance_threshold": (0, 1, "[0, 1)"),
    "gbce_calibration": (0, 1, "[0, 1]"),
    "initializer_range": (0, 1000, "[0, 1000]"),
    "layer_norm_eps": (0, 1, "[0, 1]"),
    "repeat_share": (0, 1, "[0, 1]"),
}
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
MAX_REPEAT_SHARE = 0.01  # up to here, seen items are excluded by default


class BlossomRecConfig(ManifestMixin, PreTrainedConfig):
    r"""
    Everything that defines a BlossomRec model (arXiv 2512.13368). The catalogue is the vocabulary: id 0 is `[PAD]`,
    id 1 is `[UNK]`, the items follow.

    Args:
        vocab_size (`int`): number of items plus the two special ids.
        hidden_size (`int`): width of the item embedding and of every layer.
        num_hidden_layers (`int`): number of layers.
        num_attention_heads (`int`): query heads H; `hidden_size / H`, the head width, must be even (rotary embedding).
        num_key_value_heads (`int`, *optional*): key/value heads G, a divisor of H. `None` means H.
        intermediate_size (`int`): inner width of the feed-forward.
        hidden_act (`str`): its activation.
        hidden_dropout_prob (`float`): dropout after the embedding, the attention and the feed-forward. Attention
            probabilities are never dropped.
        attention_types (`str` or `list[str]`): the streams that each layer attends with: `"blossom"` (both streams of
            the paper, gated), `"long_term"`, `"short_term"`, `"full"`, or names joined by `+`, with a gate for each; one
            word means all layers. All `"full"` is SASRec with RoPE. Streams of your own: `register_stream`. Names are
            checked when a model is built.
        compress_block_size (`int`): l, the positions that a compression window covers.
        compress_stride (`int`): s ≤ l, the distance between the ends of two windows.
        selection_block_size (`int`): b, the positions of a selection block, a multiple of s.
        num_selected_blocks (`int`): k, how many past blocks a query attends to.
        importance_threshold (`float`): β; a block whose probability is not above it is dropped.
        selection_gradient (`str`): `"straight_through"` lets the importance be learned through the logits of the
            selected blocks; `"none"` leaves the compressor at its random start, as in the authors' code.
        short_term_block_size (`int`): B, the positions of a short-term block. With 8 and a window of 1, models ranked
            better on MovieLens-1M and on the built-in data set than with 1 and 8, the constants of the authors' code.
        short_term_window (`int`): w, how many of the latest short-term blocks (the own one included) are attended.
        power_law_base (`int`): p; blocks at a distance of 1, p, p², … are attended too.
        gate_initial_bias (`list[float]`): starting biases of the long-term and the short-term gate (before the sigmoid).
        attention_bias (`bool`): biases in the query, key, value and output projections.
        rope_parameters (`dict`, *optional*): as in `transformers`; `rope_theta` defaults to 10,000.
        max_position_embeddings (`int`): read by scaled `rope_type`s only; the length of a history is not limited.
        objective (`str` or `Callable`): the training loss, at every position: `"cross_entropy"` (full softmax over the
            catalog); against drawn items, `"sampled_softmax"` (with log-Q correction), `"bce"`, `"gbce"` or `"bpr"`; or
            another name of `register_objective`, which is looked up when the model is built. A function is registered
            under its `__name__`, and the configuration keeps the name.
        cross_entropy_implementation (`str`): what computes the full softmax: `"torch"`, `"triton"` (fused kernels that
            never write the logits), `"liger"` (the fused kernel of the package liger-kernel), or `"auto"`, the fastest
            that the device, the precision and the hidden size allow. Value and gradients are the same.
        num_negatives (`int`): how many items are drawn for those; at most the number of items.
        negative_sampling (`str`): `"uniform"`, `"popularity"` or `"in_batch"` (targets of other positions).
        shared_negatives (`bool`): the same drawn items for all positions of a batch, or drawn for each.
        gbce_calibration (`float`): t of gBCE, from 0 (plain BCE) to 1 (fully calibrated).
        initializer_range (`float`): standard deviation of the initial weights.
        layer_norm_eps (`float`): epsilon of the layer norms.
        tie_word_embeddings (`bool`): whether the logits use the item embedding.
        repeat_share (`float`, *optional*): the share of the test items of the training log that already occur in their
            user's history. Up to 0.01, `recommend`, evaluation and early stopping exclude seen items by default; above,
            they exclude nothing. `None` means not measured: `recommend` excludes seen items, evaluation measures.
        blossomrec_version (`str`, *optional*): the version of this package that saved the configuration; one that a
            newer version saved is refused, because it may mean something else.

    Raises:
        ValueError: for every value that does not fit, naming the argument and what it may be.
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
                f"This checkpoint was saved by blossomrec-hf {self.blossomrec_version}, here is {VERSION}: "
                "`pip install -U blossomrec-hf`, or load it with `trust_remote_code=True`, which takes its own code."
            )
        self.blossomrec_version = VERSION
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if isinstance(self.attention_types, str):
            self.attention_types = [self.attention_types] * self.num_hidden_layers
        self.attention_types = list(self.attention_types)
        self.gate_initial_bias = list(self.gate_initial_bias)
        # A dict of its own: `transformers` completes it in place.
        self.rope_parameters = dict(self.rope_parameters or {})
        if not type(self).__module__.startswith("transformers_modules."):
            # Where the package is at hand its pipeline is registered, and the checkpoint's code is not needed;
            # `transformers` would refuse to go on without leave to run that.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "BlossomRecConfig":
        """
        As in `transformers`.

        Raises:
            ValueError: for a damaged file, and for every value that does not fit.
            OSError: where there is no such file, or it is no JSON.
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
            ValueError: for a class that is defined in a script, a notebook or a function.
        """
        require_loadable(type(self))
        super().save_pretrained(save_directory, **kwargs)
        self.write_manifest(save_directory)

    def write_manifest(self, folder: str | os.PathLike) -> None:
        """Write the hash of the configuration to the manifest of `folder`."""
        update_manifest(folder, CONFIG_NAMES)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "objective" and callable(value):  # the configuration is JSON
            value = register_objective(getattr(value, "__name__", None), value)
        super().__setattr__(name, value)

    @property
    def num_items(self) -> int:
        """The number of items: the vocabulary without `[PAD]` and `[UNK]`."""
        return self.vocab_size - NUM_SPECIAL_IDS

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def exclude_seen(self) -> bool:
        """Whether items of the history are excluded from recommendations by default, see `repeat_share`."""
        return self.repeat_share is None or self.repeat_share <= MAX_REPEAT_SHARE

    def _check_types(self) -> None:
        """What a damaged or edited config.json can have in the place of a number, before anything is computed from it."""
        for name, (least, most) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if name == "num_key_value_heads" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"`{name}` is {_short(value)}; it must be a whole number of {least} to {most}.")
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
                f"`attention_types` is {_short(self.attention_types)}; it must be a word or a list of words."
            )
        _check_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        dtype = self.dtype
        if not (dtype is None or isinstance(dtype, torch.dtype) or (isinstance(dtype, str) and dtype in _DTYPES)):
            raise ValueError(f"`dtype` is {_short(dtype)}; it must be one of {', '.join(map(repr, _DTYPES))}.")
        if not isinstance(self.blossomrec_version, str | None):
            raise ValueError(
                f"`blossomrec_version` is {_short(self.blossomrec_version)}; it must be text such as '0.1.0'."
            )
        self._check_rope()

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
        """Raises `ValueError` for every value that does not fit, naming the argument and what it may be."""
        self._check_types()
        _check_choice("model_type", self.model_type, (type(self).model_type,))
        special = (self.pad_token_id, self.unk_token_id)
        if special != (0, 1) or not all(type(token_id) is int for token_id in special):
            raise ValueError(
                f"`pad_token_id` and `unk_token_id` are {self.pad_token_id!r} and {self.unk_token_id!r}; BlossomRec's "
                "vocabulary has [PAD] at 0 and [UNK] at 1."
            )
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be `num_attention_heads` ({self.num_attention_heads}) times "
                "an even head width."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.compress_block_size < self.compress_stride:
            raise ValueError(
                f"`compress_block_size` ({self.compress_block_size}) must be at least `compress_stride` "
                f"({self.compress_stride}), or positions between two windows would never be seen."
            )
        if self.selection_block_size % self.compress_stride:
            raise ValueError(
                f"`selection_block_size` ({self.selection_block_size}) must be a multiple of `compress_stride` "
                f"({self.compress_stride})."
            )
        if len(self.attention_types) != self.num_hidden_layers:
            raise ValueError(
                f"`attention_types` names {len(self.attention_types)} layers, `num_hidden_layers` is "
                f"{self.num_hidden_layers}; give one word for all layers or one a layer."
            )
        for attention_type in self.attention_types:
            if not isinstance(attention_type, str):  # which streams there are is known when a model is built
                raise ValueError(
                    f"`attention_types` has {_short(attention_type)}; it must be a word or a list of words."
                )
        _check_choice("selection_gradient", self.selection_gradient, SELECTION_GRADIENTS)
        if not isinstance(self.objective, str):
            raise ValueError(
                f"`objective` is {_short(self.objective)}; it must be the name of an objective, or a function."
            )
        _check_choice("cross_entropy_implementation", self.cross_entropy_implementation, CROSS_ENTROPY_IMPLEMENTATIONS)
        _check_choice("negative_sampling", self.negative_sampling, NEGATIVE_SAMPLINGS)
        if self.objective in SAMPLED_OBJECTIVES and not 1 <= self.num_negatives <= self.num_items:
            raise ValueError(
                f"`num_negatives` is {self.num_negatives!r}; it must lie in 1 … {self.num_items}, the number of items."
            )


def _is_newer(saved: str | None, here: str) -> bool:
    """Whether `saved` is of a later version than `here`, but for the last of their three numbers, which fixes errors."""
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
