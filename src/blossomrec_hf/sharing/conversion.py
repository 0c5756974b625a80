"""
Checkpoints of the authors' code (`BlossomRec` in RecBole) and ours: the same function, or refused with a sentence.

Facts about their layers are those of github.com/ronineume/BlossomRec. Where they differ from ours in form alone: their
rotary embedding turns neighbouring numbers, ours halves; they follow the head projection with another linear layer; the
compressor's last bias moves the scores of all blocks alike and chooses nothing; what makes compressed values is unused.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation


# What the authors' code has as constants, in our words.
AUTHORS_CONSTANTS = {
    "compress_stride": 16,
    "selection_block_size": 16,
    "num_selected_blocks": 4,
    "importance_threshold": 1e-10,
    "short_term_block_size": 1,
    "short_term_window": 8,
    "power_law_base": 2,
}
_LAYER = "trm_encoder.layer.{}."
_SPARSE = _LAYER + "blossom_attention.sparse_attention."
_UNUSED = re.compile(r".*\.(compress_mem_kv|v_intrablock_positions|v_compress\..*|k_compress\.3\.bias|rotary_emb\..*)")


def _refuse_another_model(state: Mapping[str, torch.Tensor]) -> None:
    positions = [name for name in state if re.search(r"(^|\.)(pos(ition)?_?emb\w*|pos_embedding)\.", name)]
    norms = [name for name in state if re.search(r"transformer_blocks\.\d+\.first_norm|attention_layernorms\.", name)]
    if positions or norms:
        reasons = []
        if positions:
            reasons.append(f"adds learned positions (`{positions[0]}`) where BlossomRec turns queries and keys")
        if norms:
            reasons.append(f"normalises before each layer (`{norms[0]}`) where BlossomRec does after it")
        raise ValueError(
            f"This is a checkpoint of SASRec or its kin: it {' and '.join(reasons)}. No weights make the two the same "
            "function, so it is not converted; `attention_types='full'`, trained anew, is the nearest thing."
        )


def _halves_from_pairs(width: int) -> torch.Tensor:
    """Where each of our numbers of a head lies in theirs: first of every pair, then second of every pair."""
    return torch.arange(width).unflatten(0, (-1, 2)).T.flatten()


def from_authors(
    state: Mapping[str, torch.Tensor], *, num_attention_heads: int = 8, **settings: Any
) -> BlossomRecForSequentialRecommendation:
    """
    The model of ours that computes what the authors' does: `logits[..., 2:]` are their scores of items 1, 2, …. Their
    item i has the vocabulary id i + 1, because ours has [UNK] at 1.

    Args:
        state: their `state_dict`.
        num_attention_heads: which the weights do not tell (`n_heads` in their settings).
        settings: other arguments of `BlossomRecConfig` that the weights do not tell, such as `hidden_act`; what the
            authors' code has as constants is set already.

    Raises:
        ValueError: for a checkpoint of another model, or one that would not be the same function.
    """
    _refuse_another_model(state)
    try:
        return _from_authors(dict(state), num_attention_heads, settings)
    except (KeyError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        problem = f"it lacks `{error.args[0]}`" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"`state` has not the weights of the authors' BlossomRec: {problem}.") from error


def _from_authors(
    state: dict[str, torch.Tensor], num_attention_heads: int, settings: dict[str, Any]
) -> BlossomRecForSequentialRecommendation:
    if "item_embedding.weight" not in state or _SPARSE.format(0) + "to_qkv.weight" not in state:
        raise ValueError("`state` holds no weights of the authors' BlossomRec (no `item_embedding`, or no `to_qkv`).")
    embedding = state.pop("item_embedding.weight")
    num_layers = len({name.split(".")[2] for name in state if name.startswith("trm_encoder.layer.")})
    groups, length, width = state[_SPARSE.format(0) + "k_intrablock_positions"].shape
    if width * num_attention_heads != embedding.shape[1]:
        raise ValueError(
            f"`num_attention_heads` is {num_attention_heads}; with heads of width {width} and an embedding of width "
            f"{embedding.shape[1]} it must be {embedding.shape[1] // width}."
        )
    biases = [state[_LAYER.format(i) + "blossom_attention.dense.bias"] for i in range(num_layers)]
    config = BlossomRecConfig(
        **{
            **AUTHORS_CONSTANTS,
            "vocab_size": embedding.shape[0] + 1,
            "hidden_size": embedding.shape[1],
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": groups,
            "intermediate_size": state[_LAYER.format(0) + "feed_forward.dense_1.weight"].shape[0],
            "compress_block_size": length,
            "selection_gradient": "none",  # as theirs
            "attention_bias": any(bool(bias.any()) for bias in biases),
            **settings,
        }
    )
    order = _halves_from_pairs(width)
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    for name in [name for name in state if name.endswith("rotary_emb.freqs")]:
        if not torch.allclose(state[name].double(), config.rope_parameters["rope_theta"] ** -exponent, rtol=1e-4):
            raise ValueError(
                f"`{name}` are not the usual frequencies of a rotary embedding; ours are, and cannot learn."
            )

    ours = {
        "model.item_embedding.weight": torch.cat([embedding[:1], torch.zeros_like(embedding[:1]), embedding[1:]]),
        "model.embedding_norm.weight": state.pop("LayerNorm.weight"),
        "model.embedding_norm.bias": state.pop("LayerNorm.bias"),
    }
    for i in range(num_layers):
        take = {name: state.pop(name) for name in list(state) if name.startswith(_LAYER.format(i))}
        sparse = {name.removeprefix(_SPARSE.format(i)): value for name, value in take.items()}
        layer = {name.removeprefix(_LAYER.format(i)): value for name, value in take.items()}
        to = f"model.layers.{i}."
        q, k, v = sparse["to_qkv.weight"].split([config.hidden_size, groups * width, groups * width])
        for name, weight in (("q", q), ("k", k)):
            turned = weight.unflatten(0, (-1, width))[:, order].flatten(0, 1)
            ours[f"{to}self_attn.{name}_proj.weight"] = turned
        ours[f"{to}self_attn.v_proj.weight"] = v
        dense = layer["blossom_attention.dense.weight"]
        folded = dense.double() @ sparse["combine_heads.weight"].double()
        ours[f"{to}self_attn.o_proj.weight"] = folded.to(dense.dtype)
        if config.attention_bias:
            ours[f"{to}self_attn.o_proj.bias"] = layer["blossom_attention.dense.bias"]
            for name, weight in (("q", q), ("k", k), ("v", v)):
                ours[f"{to}self_attn.{name}_proj.bias"] = weight.new_zeros(len(weight))
        first, last = sparse["k_compress.1.weight"], sparse["k_compress.3.weight"]
        if first.shape != (length * width, length * width):
            raise ValueError(f"The compressor's inner layer is {list(first.shape)}; ours is as wide as its input.")
        ours[f"{to}self_attn.compressor.position"] = sparse["k_intrablock_positions"][..., order]
        inner = first.unflatten(1, (length, width))[..., order].flatten(1)
        ours[f"{to}self_attn.compressor.mlp.0.weight"] = inner
        ours[f"{to}self_attn.compressor.mlp.0.bias"] = sparse["k_compress.1.bias"]
        ours[f"{to}self_attn.compressor.mlp.2.weight"] = last[order]
        for part in ("weight", "bias"):  # theirs: both streams of a head together; ours: all heads of a stream
            gate = sparse[f"to_strategy_combine.0.{part}"].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
            ours[f"{to}self_attn.gate.{part}"] = gate
            ours[f"{to}attention_norm.{part}"] = layer[f"blossom_attention.LayerNorm.{part}"]
            ours[f"{to}up_proj.{part}"] = layer[f"feed_forward.dense_1.{part}"]
            ours[f"{to}down_proj.{part}"] = layer[f"feed_forward.dense_2.{part}"]
            ours[f"{to}feed_forward_norm.{part}"] = layer[f"feed_forward.LayerNorm.{part}"]
        used = {name.format(i) for name in _layer_names()}
        state |= {name: value for name, value in take.items() if name not in used and not _UNUSED.fullmatch(name)}
    if state:
        raise ValueError(f"`state` also holds {', '.join(sorted(state)[:5])}, which has no place in BlossomRec.")
    model = BlossomRecForSequentialRecommendation(config).to(embedding.dtype)
    ours["model.item_counts"] = model.item_counts  # not known; zero
    ours["lm_head.weight"] = ours["model.item_embedding.weight"]
    model.load_state_dict(ours)
    return model.eval()


def _layer_names() -> list[str]:
    """The names of the authors' weights of one layer that are used."""
    sparse = "to_qkv.weight combine_heads.weight k_intrablock_positions k_compress.1.weight k_compress.1.bias "
    sparse += "k_compress.3.weight to_strategy_combine.0.weight to_strategy_combine.0.bias"
    layer = "blossom_attention.dense blossom_attention.LayerNorm feed_forward.dense_1 feed_forward.dense_2 "
    layer += "feed_forward.LayerNorm"
    return [_SPARSE + name for name in sparse.split()] + [
        f"{_LAYER}{name}.{part}" for name in layer.split() for part in ("weight", "bias")
    ]


def to_authors(model: BlossomRecForSequentialRecommendation) -> dict[str, torch.Tensor]:
    """
    The other way: a `state_dict` that the authors' model loads, and that gives the same scores of items.

    Raises:
        ValueError: for a model that theirs cannot be: other layers, or other sizes than their code's constants.
    """
    config = model.config
    wanted = {**AUTHORS_CONSTANTS, "attention_types": ["blossom"] * config.num_hidden_layers, "num_key_value_heads": 2}
    wanted |= {"compress_block_size": 32, "tie_word_embeddings": True}
    others = {name: getattr(config, name) for name, value in wanted.items() if getattr(config, name) != value}
    if config.rope_parameters["rope_type"] != "default" or config.rope_parameters["rope_theta"] != 10000.0:
        others["rope_parameters"] = config.rope_parameters
    if others:
        told = "; ".join(
            f"`{name}` is {value!r}, theirs {wanted.get(name, 'the usual one')!r}" for name, value in others.items()
        )
        raise ValueError(f"`model` cannot be one of the authors' code, which has constants in these places: {told}.")
    ours = {name: value.detach().clone() for name, value in model.state_dict().items()}
    heads, groups, width, length = config.num_attention_heads, 2, config.head_dim, config.compress_block_size
    back = _halves_from_pairs(width).argsort()
    embedding = ours["model.item_embedding.weight"]
    theirs = {"item_embedding.weight": torch.cat([embedding[:1], embedding[NUM_SPECIAL_IDS:]])}
    for part in ("weight", "bias"):
        theirs[f"LayerNorm.{part}"] = ours[f"model.embedding_norm.{part}"]
    for i in range(config.num_hidden_layers):
        at, layer, sparse = f"model.layers.{i}.", _LAYER.format(i), _SPARSE.format(i)
        q, k, v = (ours[f"{at}self_attn.{name}_proj.weight"] for name in "qkv")
        if config.attention_bias and any(bool(ours[f"{at}self_attn.{name}_proj.bias"].any()) for name in "qkv"):
            raise ValueError(f"`model` has biases in the queries, keys or values of layer {i}; theirs has none.")
        q, k = (weight.unflatten(0, (-1, width))[:, back].flatten(0, 1) for weight in (q, k))
        theirs[sparse + "to_qkv.weight"] = torch.cat([q, k, v])
        theirs[sparse + "combine_heads.weight"] = ours[f"{at}self_attn.o_proj.weight"]
        theirs[layer + "blossom_attention.dense.weight"] = torch.eye(config.hidden_size, dtype=q.dtype)
        bias = ours.get(f"{at}self_attn.o_proj.bias", q.new_zeros(config.hidden_size))
        theirs[layer + "blossom_attention.dense.bias"] = bias
        theirs[sparse + "k_intrablock_positions"] = ours[f"{at}self_attn.compressor.position"][..., back]
        first = ours[f"{at}self_attn.compressor.mlp.0.weight"].unflatten(1, (length, width))[..., back].flatten(1)
        theirs[sparse + "k_compress.1.weight"] = first
        theirs[sparse + "k_compress.1.bias"] = ours[f"{at}self_attn.compressor.mlp.0.bias"]
        theirs[sparse + "k_compress.3.weight"] = ours[f"{at}self_attn.compressor.mlp.2.weight"][back]
        theirs[sparse + "k_compress.3.bias"] = q.new_zeros(width)
        for part in ("weight", "bias"):
            gate = ours[f"{at}self_attn.gate.{part}"].unflatten(0, (2, heads)).transpose(0, 1).flatten(0, 1)
            theirs[f"{sparse}to_strategy_combine.0.{part}"] = gate
            theirs[f"{layer}blossom_attention.LayerNorm.{part}"] = ours[f"{at}attention_norm.{part}"]
            theirs[f"{layer}feed_forward.dense_1.{part}"] = ours[f"{at}up_proj.{part}"]
            theirs[f"{layer}feed_forward.dense_2.{part}"] = ours[f"{at}down_proj.{part}"]
            theirs[f"{layer}feed_forward.LayerNorm.{part}"] = ours[f"{at}feed_forward_norm.{part}"]
        # What their code never reads, but loads.
        theirs[sparse + "v_intrablock_positions"] = q.new_zeros(groups, length, width)
        theirs[sparse + "compress_mem_kv"] = q.new_zeros(2, groups, 1, width)
        theirs[sparse + "rotary_emb.freqs"] = 10000.0 ** -(torch.arange(0, width, 2) / width)
        for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
            theirs[f"{sparse}v_compress.{name}"] = torch.zeros_like(theirs[f"{sparse}k_compress.{name}"])
    return theirs


__all__ = ["from_authors", "to_authors"]
