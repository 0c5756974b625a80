"""
Conversion of checkpoints between the authors' code (`BlossomRec` in RecBole, github.com/ronineume/BlossomRec) and this
package. The converted model computes the same scores; a model that cannot is refused.

The authors' layers differ in form only:

- Their rotary embedding rotates pairs of neighboring features, ours pairs of one feature from each half of a head.
- They apply another linear layer after the output projection; the two are multiplied into one.
- Their gate orders its outputs by head, ours by stream.
- The last bias of their compressor shifts the scores of all blocks equally, and the weights that compress values are unused.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation


State = dict[str, torch.Tensor]

# The constants in the authors' code, as arguments of `BlossomRecConfig`.
AUTHORS_CONSTANTS = {
    "compress_stride": 16,
    "selection_block_size": 16,
    "num_selected_blocks": 4,
    "importance_threshold": 1e-10,
    "short_term_block_size": 1,
    "short_term_window": 8,
    "power_law_base": 2,
}
_THETA = 10000.0
_LAYER = "trm_encoder.layer.{}."
_SPARSE = "blossom_attention.sparse_attention."
_UNUSED = re.compile(r".*\.(compress_mem_kv|v_intrablock_positions|v_compress\..*|k_compress\.3\.bias|rotary_emb\..*)")
# Their name → ours, for the weights of a layer that are the same.
_SAME = {
    _SPARSE + "k_compress.1.bias": "self_attn.compressor.mlp.0.bias",
    **{
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in (
            ("blossom_attention.LayerNorm", "attention_norm"),
            ("feed_forward.dense_1", "up_proj"),
            ("feed_forward.dense_2", "down_proj"),
            ("feed_forward.LayerNorm", "feed_forward_norm"),
        )
        for part in ("weight", "bias")
    },
}


def from_authors(
    state: Mapping[str, torch.Tensor], *, num_attention_heads: int = 8, **settings: Any
) -> BlossomRecForSequentialRecommendation:
    """
    Convert a checkpoint of the authors' code. `logits[..., 2:]` of the result are the authors' scores of items 1, 2, ….
    Their item i gets the vocabulary id i + 1, because `[UNK]` is 1 here.

    Args:
        state: the `state_dict` of the authors' model.
        num_attention_heads: the number of query heads (`n_heads` of their settings), which the weights do not show.
        settings: other arguments of `BlossomRecConfig` that the weights do not show, such as `hidden_act`. The constants
            of the authors' code are set already.

    Raises:
        ValueError: if `state` belongs to another model, or to one that would not compute the same function.
    """
    _refuse_other_models(state)
    try:
        return _from_authors(dict(state), num_attention_heads, settings)
    except (KeyError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        problem = f"it lacks `{error.args[0]}`" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"`state` is no checkpoint of the authors' BlossomRec: {problem}; give the `state_dict` of their model."
        ) from error


def to_authors(model: BlossomRecForSequentialRecommendation) -> State:
    """
    Convert a model to a `state_dict` of the authors' code, with the same scores of items.

    Raises:
        ValueError: if the authors' code has no such model: other attention types, or other sizes than its constants.
    """
    _require_authors_settings(model.config)
    ours = {name: value.detach().clone() for name, value in model.state_dict().items()}
    embedding = ours["model.item_embedding.weight"]
    theirs = {"item_embedding.weight": torch.cat([embedding[:1], embedding[NUM_SPECIAL_IDS:]])}
    for part in ("weight", "bias"):
        theirs[f"LayerNorm.{part}"] = ours[f"model.embedding_norm.{part}"]
    for i in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}
        if any(bool(layer[f"self_attn.{name}_proj.bias"].any()) for name in "qkv" if model.config.attention_bias):
            raise ValueError(
                f"`model` has biases of queries, keys or values in layer {i}, which the authors' code does not have."
            )
        theirs |= {_LAYER.format(i) + name: value for name, value in _layer_to_authors(layer, model.config).items()}
    return theirs


def _refuse_other_models(state: Mapping[str, torch.Tensor]) -> None:
    positions = [name for name in state if re.search(r"(^|\.)(pos(ition)?_?emb\w*|pos_embedding)\.", name)]
    norms = [name for name in state if re.search(r"transformer_blocks\.\d+\.first_norm|attention_layernorms\.", name)]
    reasons = [f"it adds learned positions (`{positions[0]}`)"] if positions else []
    reasons += [f"it normalizes before each layer (`{norms[0]}`)"] if norms else []
    if reasons:
        raise ValueError(
            f"`state` is a checkpoint of SASRec or a similar model: {' and '.join(reasons)}, which BlossomRec does not. No "
            "weights give the same function; train a new model with `attention_types='full'` instead."
        )
    for name in ("item_embedding.weight", _LAYER.format(0) + _SPARSE + "to_qkv.weight"):
        if name not in state:
            raise ValueError(
                f"`state` has no weights of the authors' BlossomRec (`{name}`); give the `state_dict` of their model."
            )


def _from_authors(
    state: State, num_attention_heads: int, settings: dict[str, Any]
) -> BlossomRecForSequentialRecommendation:
    config = _config_from_authors(state, num_attention_heads, settings)
    embedding = state.pop("item_embedding.weight")
    ours = {
        "model.item_embedding.weight": torch.cat([embedding[:1], torch.zeros_like(embedding[:1]), embedding[1:]]),
        "model.embedding_norm.weight": state.pop("LayerNorm.weight"),
        "model.embedding_norm.bias": state.pop("LayerNorm.bias"),
    }
    for i in range(config.num_hidden_layers):
        prefix = _LAYER.format(i)
        names = [name for name in state if name.startswith(prefix)]
        layer = {name.removeprefix(prefix): state.pop(name) for name in names}
        ours |= {f"model.layers.{i}.{name}": value for name, value in _layer_from_authors(layer, config).items()}
        state |= {prefix + name: value for name, value in layer.items() if not _UNUSED.fullmatch(name)}
    if state:
        raise ValueError(f"`state` also has {', '.join(sorted(state)[:5])}, for which BlossomRec has no place.")
    model = BlossomRecForSequentialRecommendation(config).to(embedding.dtype)
    ours["model.log_statistics.item_counts"] = model.item_counts  # zeros: the checkpoint has no counts
    ours["lm_head.weight"] = ours["model.item_embedding.weight"]
    model.load_state_dict(ours)
    return model.eval()


def _config_from_authors(state: State, num_attention_heads: int, settings: dict[str, Any]) -> BlossomRecConfig:
    first = _LAYER.format(0)
    num_rows, hidden_size = state["item_embedding.weight"].shape
    num_layers = len({name.split(".")[2] for name in state if name.startswith("trm_encoder.layer.")})
    groups, length, width = state[first + _SPARSE + "k_intrablock_positions"].shape
    if width * num_attention_heads != hidden_size:
        raise ValueError(
            f"`num_attention_heads` is {num_attention_heads}; with heads of width {width} and an embedding of width "
            f"{hidden_size}, it must be {hidden_size // width}."
        )
    biases = [state[_LAYER.format(i) + "blossom_attention.dense.bias"] for i in range(num_layers)]
    derived = {
        "vocab_size": num_rows + 1,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": groups,
        "intermediate_size": len(state[first + "feed_forward.dense_1.weight"]),
        "compress_block_size": length,
        "selection_gradient": "none",
        "attention_bias": any(bool(bias.any()) for bias in biases),
    }
    config = BlossomRecConfig(**{**AUTHORS_CONSTANTS, **derived, **settings})
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    for name in [name for name in state if name.endswith("rotary_emb.freqs")]:
        if not torch.allclose(state[name].double(), frequencies, rtol=1e-4):
            raise ValueError(
                f"`{name}` are not the default frequencies of a rotary embedding; BlossomRec supports no learned ones."
            )
    return config


def _require_authors_settings(config: BlossomRecConfig) -> None:
    wanted = {**AUTHORS_CONSTANTS, "attention_types": ["blossom"] * config.num_hidden_layers, "num_key_value_heads": 2}
    wanted |= {"compress_block_size": 32, "tie_word_embeddings": True, "scoring": "dot"}
    wanted |= dict.fromkeys(("item_features", "time_features", "event_types"))
    others = {name: getattr(config, name) for name, value in wanted.items() if getattr(config, name) != value}
    if config.rope_parameters["rope_type"] != "default" or config.rope_parameters["rope_theta"] != _THETA:
        others["rope_parameters"] = config.rope_parameters
    if others:
        problems = "; ".join(
            f"`{name}` is {value!r} (theirs {wanted.get(name, 'the default')!r})" for name, value in others.items()
        )
        raise ValueError(f"`model` has settings that are constants of the authors' code: {problems}.")


def _permutation(width: int) -> torch.Tensor:
    """The place in the authors' order of each feature of a head in ours: the first of all pairs, then the second."""
    return torch.arange(width).unflatten(0, (-1, 2)).T.flatten()


def _permute_rows(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Permute the features of each head, which are the rows of a projection."""
    return weight.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def _permute_columns(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Permute the features of each head, which are the columns of the compressor's first layer."""
    return weight.unflatten(1, (-1, len(order)))[..., order].flatten(1)


def _layer_from_authors(theirs: State, config: BlossomRecConfig) -> State:
    """The weights of a layer. Removes from `theirs` those that it uses."""
    order = _permutation(config.head_dim)
    ours = {name: theirs.pop(their_name) for their_name, name in _SAME.items()}
    widths = [config.hidden_size, *(2 * [config.num_key_value_heads * config.head_dim])]
    q, k, v = theirs.pop(_SPARSE + "to_qkv.weight").split(widths)
    ours |= {
        "self_attn.q_proj.weight": _permute_rows(q, order),
        "self_attn.k_proj.weight": _permute_rows(k, order),
        "self_attn.v_proj.weight": v,
    }
    dense, heads = theirs.pop("blossom_attention.dense.weight"), theirs.pop(_SPARSE + "combine_heads.weight")
    ours["self_attn.o_proj.weight"] = (dense.double() @ heads.double()).to(dense.dtype)
    bias = theirs.pop("blossom_attention.dense.bias")
    if config.attention_bias:
        ours["self_attn.o_proj.bias"] = bias
        ours |= {f"self_attn.{name}_proj.bias": bias.new_zeros(width) for name, width in zip("qkv", widths)}
    inner, width = theirs.pop(_SPARSE + "k_compress.1.weight"), config.compress_block_size * config.head_dim
    if inner.shape != (width, width):
        raise ValueError(f"The first layer of the compressor is {list(inner.shape)}; it must be {[width, width]}.")
    ours["self_attn.compressor.position"] = theirs.pop(_SPARSE + "k_intrablock_positions")[..., order]
    ours["self_attn.compressor.mlp.0.weight"] = _permute_columns(inner, order)
    ours["self_attn.compressor.mlp.2.weight"] = theirs.pop(_SPARSE + "k_compress.3.weight")[order]
    for part in ("weight", "bias"):
        gate = theirs.pop(f"{_SPARSE}to_strategy_combine.0.{part}")
        ours[f"self_attn.gate.{part}"] = gate.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    return ours


def _layer_to_authors(ours: State, config: BlossomRecConfig) -> State:
    """The weights of a layer, with those that the authors' code loads but does not use."""
    heads, width, groups = config.num_attention_heads, config.head_dim, config.num_key_value_heads
    order = _permutation(width).argsort()
    theirs = {their_name: ours[name] for their_name, name in _SAME.items()}
    q, k, v = (ours[f"self_attn.{name}_proj.weight"] for name in "qkv")
    theirs[_SPARSE + "to_qkv.weight"] = torch.cat([_permute_rows(q, order), _permute_rows(k, order), v])
    theirs[_SPARSE + "combine_heads.weight"] = ours["self_attn.o_proj.weight"]
    theirs["blossom_attention.dense.weight"] = torch.eye(config.hidden_size, dtype=q.dtype)
    bias = ours.get("self_attn.o_proj.bias", q.new_zeros(config.hidden_size))
    theirs["blossom_attention.dense.bias"] = bias
    theirs[_SPARSE + "k_intrablock_positions"] = ours["self_attn.compressor.position"][..., order]
    theirs[_SPARSE + "k_compress.1.weight"] = _permute_columns(ours["self_attn.compressor.mlp.0.weight"], order)
    theirs[_SPARSE + "k_compress.3.weight"] = ours["self_attn.compressor.mlp.2.weight"][order]
    theirs[_SPARSE + "k_compress.3.bias"] = q.new_zeros(width)
    for part in ("weight", "bias"):
        gate = ours[f"self_attn.gate.{part}"]
        theirs[f"{_SPARSE}to_strategy_combine.0.{part}"] = gate.unflatten(0, (2, heads)).transpose(0, 1).flatten(0, 1)
    theirs[_SPARSE + "v_intrablock_positions"] = q.new_zeros(groups, config.compress_block_size, width)
    theirs[_SPARSE + "compress_mem_kv"] = q.new_zeros(2, groups, 1, width)
    theirs[_SPARSE + "rotary_emb.freqs"] = _THETA ** -(torch.arange(0, width, 2) / width)
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
        theirs[f"{_SPARSE}v_compress.{name}"] = torch.zeros_like(theirs[f"{_SPARSE}k_compress.{name}"])
    return theirs


__all__ = ["from_authors", "to_authors"]
