"""Configuration of BlossomRec models."""

import os
import re
from typing import Any

from transformers import PreTrainedConfig

from .checkpoint_blossomrec import require_loadable
from .manifest_blossomrec import CONFIG_NAMES, update_manifest


VERSION = "0.1.0"  # that of the package, which this file cannot import where it travels with a checkpoint

ATTENTION_TYPES = ("blossom", "long_term", "short_term", "full")
SELECTION_GRADIENTS = ("straight_through", "none")
OBJECTIVES = ("cross_entropy", "sampled_softmax", "bce", "gbce", "bpr")
NEGATIVE_SAMPLINGS = ("uniform", "popularity", "in_batch")
CROSS_ENTROPY_IMPLEMENTATIONS = ("auto", "torch", "triton", "liger")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
MAX_REPEAT_SHARE = 0.01  # up to here, seen items are excluded by default


class BlossomRecConfig(PreTrainedConfig):
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
        attention_types (`str` or `list[str]`): what each layer attends with, one of `"blossom"` (both streams, gated),
            `"long_term"`, `"short_term"` or `"full"`; one word means all layers. All `"full"` is SASRec with RoPE.
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
        objective (`str`): the training loss, at every position: `"cross_entropy"` (full softmax over the catalogue) or,
            against drawn items, `"sampled_softmax"` (with log-Q correction), `"bce"`, `"gbce"` or `"bpr"`.
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
    objective: str = "cross_entropy"
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

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        As in `transformers`; also writes the hash of the file to the manifest of the folder.

        Raises:
            ValueError: for a class that is defined in a script, a notebook or a function.
        """
        require_loadable(type(self))
        super().save_pretrained(save_directory, **kwargs)
        update_manifest(save_directory, CONFIG_NAMES)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def exclude_seen(self) -> bool:
        """Whether items of the history are excluded from recommendations by default, see `repeat_share`."""
        return self.repeat_share is None or self.repeat_share <= MAX_REPEAT_SHARE

    def check(self) -> None:
        """Raises `ValueError` for every value that does not fit, naming the argument and what it may be."""
        for name in (
            "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size compress_stride "
            "compress_block_size selection_block_size num_selected_blocks short_term_block_size short_term_window"
        ).split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
        if not isinstance(self.vocab_size, int) or self.vocab_size < 3:
            raise ValueError(
                f"`vocab_size` is {self.vocab_size!r}; it counts [PAD], [UNK] and the items, so at least 3."
            )
        if (self.pad_token_id, self.unk_token_id) != (0, 1):
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
        if not isinstance(self.power_law_base, int) or self.power_law_base < 2:
            raise ValueError(f"`power_law_base` is {self.power_law_base!r}; it must be a whole number of at least 2.")
        if not 0 <= self.importance_threshold < 1:
            raise ValueError(
                f"`importance_threshold` is {self.importance_threshold!r}; a probability, it must lie in [0, 1)."
            )
        if self.repeat_share is not None and not 0 <= self.repeat_share <= 1:
            raise ValueError(f"`repeat_share` is {self.repeat_share!r}; it must lie in [0, 1], or be None.")
        if not 0 <= self.hidden_dropout_prob < 1:
            raise ValueError(f"`hidden_dropout_prob` is {self.hidden_dropout_prob!r}; it must lie in [0, 1).")
        if len(self.gate_initial_bias) != 2:
            raise ValueError(
                f"`gate_initial_bias` is {self.gate_initial_bias!r}; it holds two numbers, for the long-term and the "
                "short-term gate."
            )
        if len(self.attention_types) != self.num_hidden_layers:
            raise ValueError(
                f"`attention_types` names {len(self.attention_types)} layers, `num_hidden_layers` is "
                f"{self.num_hidden_layers}; give one word for all layers or one a layer."
            )
        for attention_type in self.attention_types:
            _check_choice("attention_types", attention_type, ATTENTION_TYPES)
        _check_choice("selection_gradient", self.selection_gradient, SELECTION_GRADIENTS)
        _check_choice("objective", self.objective, OBJECTIVES)
        _check_choice("cross_entropy_implementation", self.cross_entropy_implementation, CROSS_ENTROPY_IMPLEMENTATIONS)
        _check_choice("negative_sampling", self.negative_sampling, NEGATIVE_SAMPLINGS)
        if self.objective != "cross_entropy" and not 1 <= self.num_negatives <= self.vocab_size - 2:
            raise ValueError(
                f"`num_negatives` is {self.num_negatives!r}; it must lie in 1 … {self.vocab_size - 2}, the number of items."
            )
        if not 0 <= self.gbce_calibration <= 1:
            raise ValueError(f"`gbce_calibration` is {self.gbce_calibration!r}; it must lie in [0, 1].")
        _check_choice("rope_parameters['rope_type']", self.rope_parameters["rope_type"], ROPE_TYPES)


def _is_newer(saved: str | None, here: str) -> bool:
    """Whether `saved` is of a later version than `here`, but for the last of their three numbers, which fixes errors."""
    numbers = [re.findall(r"\d+", version)[:2] for version in (saved or "0", here)]
    return [int(number) for number in numbers[0]] > [int(number) for number in numbers[1]]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


__all__ = ["BlossomRecConfig"]
