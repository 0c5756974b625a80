"""Modules in inference: refusal of training mode, weights that can be read, and a fingerprint of all weights."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


_PACKAGE = __name__.rpartition(".")[0]

# Files whose modules compute the same in both modes. The first is that of containers, which have no `forward`.
_MODELESS = ("module", "linear", "sparse", "normalization", "container", "activation")
_MODELESS = tuple(f"torch.nn.modules.{name}" for name in _MODELESS)
_MODELESS += ("transformers.activations", "torch._dynamo.eval_frame")

_PLAIN = (torch.Tensor, nn.Parameter)

_DIGEST_ELEMENTS = 2**24  # elements of a tensor that are copied to the CPU at a time


_optimizer_steps = 0  # of all optimizers in this process


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change weights in place without a new version of the tensor.
register_optimizer_step_post_hook(_count_step)


@functools.cache
def _ignores_training(kind: type) -> bool:
    """Whether modules of a class compute the same in both modes, or (ours) get the mode as an argument."""
    if kind in (nn.RReLU, nn.MultiheadAttention):
        return False
    file = kind.forward.__module__
    return file in _MODELESS or file.rpartition(".")[0] == _PACKAGE or file.startswith("torch.ao.nn.")


def _modules(module: nn.Module) -> list[nn.Module]:
    """`list(module.modules())`, in another order and faster."""
    found = [module]
    for module in found:
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def _tensors(modules: list[nn.Module]) -> list[torch.Tensor]:
    """The parameters and buffers of modules."""
    found: list[torch.Tensor | None] = []
    for module in modules:
        if module._parameters:
            found += module._parameters.values()
        if module._buffers:
            found += module._buffers.values()
    return [x for x in found if x is not None]


@torch.compiler.disable
def check_inference(model: nn.Module) -> None:
    """
    Refuse a model with a module in training mode that is not BlossomRec's own, such as the dropout of an adapter.

    Raises:
        ValueError: names the module and its class.
    """
    if all(_ignores_training(type(module)) for module in _modules(model) if module.training):
        return
    for name, module in model.named_modules():
        if module.training and not _ignores_training(type(module)):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"`{name}` ({kind}) is in training mode, where it may compute something else than in evaluation mode; "
                "call `model.eval()` before inference."
            )


class LogStatistics(nn.Module):
    """
    Numbers of the training data. They have a module of their own because automatic device maps (`device_map="balanced"`)
    place modules: a buffer of a module that is split gets no device.
    """

    def __init__(self, vocab_size: int, with_times: bool) -> None:
        super().__init__()
        self.register_buffer("item_counts", torch.zeros(vocab_size, dtype=torch.long))
        if with_times:
            self.register_buffer("latest_time", torch.zeros((), dtype=torch.long))


class ItemEmbedding(nn.Embedding):
    """An embedding whose vectors may be given: those of items with features, of which its weight is a part."""

    def forward(self, ids: torch.Tensor, vectors: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight if vectors is None else vectors, self.padding_idx)


_PLAIN_FORWARDS = (nn.Linear.forward, nn.Embedding.forward, ItemEmbedding.forward)


def is_plain(module: nn.Module) -> bool:
    """
    Whether a linear layer or an embedding uses its `weight` as stored: it is not offloaded, quantized or adapted.
    """
    if getattr(type(module), "forward", None) not in _PLAIN_FORWARDS or "forward" in module.__dict__:
        return False
    return not (module.weight.is_meta or hasattr(module.weight, "__tensor_flatten__"))


def project(linears: Sequence[nn.Linear], x: torch.Tensor, *, joined: bool) -> list[torch.Tensor]:
    """
    The outputs `[..., out_features]` of several linear layers for one input `[..., in_features]`.

    Args:
        joined: whether plain layers without hooks are one matrix product, if the input is on a GPU.
    """
    if joined and x.is_cuda and all(is_plain(linear) and not _has_hooks(linear) for linear in linears):
        return _project_joined(linears, x)
    return [linear(x) for linear in linears]


def _project_joined(linears: Sequence[nn.Linear], x: torch.Tensor) -> list[torch.Tensor]:
    """`project` as one matrix product."""
    joined = nn.functional.linear(x, torch.cat([linear.weight for linear in linears]))
    parts = joined.split([linear.out_features for linear in linears], -1)
    pairs = zip(parts, linears, strict=True)
    return [part if linear.bias is None else part + linear.bias.to(part.dtype) for part, linear in pairs]


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module calls hooks of its own in a forward or backward pass."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def dense_weight(linear: nn.Linear) -> torch.Tensor:
    """
    The weight `[out_features, in_features]` that a linear layer without bias multiplies with, differentiable. If the
    layer is offloaded, quantized or adapted, its `forward` computes the weight.
    """
    if is_plain(linear):
        return linear.weight
    weight = getattr(linear, "weight", None)
    dtype = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32
    return linear(torch.eye(linear.in_features, dtype=dtype, device=execution_device(linear))).T


def all_vectors(embedding: nn.Module, number: int) -> torch.Tensor:
    """The vectors `[number, embedding_dim]` of all ids, differentiable; by its `forward` as in `dense_weight`."""
    if is_plain(embedding):
        return embedding.weight
    return embedding(torch.arange(number, device=execution_device(embedding)))


def stored_item_vectors(model: nn.Module) -> torch.Tensor:
    """
    The item vectors `[vocab_size, hidden_size]` of a model that stores them as they are, as an index of them requires.

    Raises:
        ValueError: the output embedding is offloaded, quantized or adapted.
    """
    head = model.get_output_embeddings()
    if head is not None and not is_plain(head):
        raise ValueError(
            f"`index` requires item vectors in memory, but the output embedding ({type(head).__qualname__}) is "
            "offloaded, quantized or adapted; omit `index`."
        )
    return model.item_vectors()


def has_plain_compressor(attention: nn.Module) -> bool:
    """Whether an attention layer has no compressor, or one whose weights are stored as they are."""
    compressor = getattr(attention, "compressor", None)
    if compressor is None:
        return True
    return not compressor.position.is_meta and is_plain(compressor.mlp[0]) and is_plain(compressor.mlp[2])


def execution_device(model: nn.Module) -> torch.device:
    """The device of a model's input, also if `accelerate` offloads its weights."""
    for module in _modules(model):
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    for tensor in model.parameters():
        return tensor.device
    return torch.device("cpu")


class WeightsFingerprint(NamedTuple):
    """
    Digests of the weights that hidden states depend on.

    Attributes:
        layers: digest of all weights but those of single items.
        items: digest of the embedding and the features of the first `num_items` vocabulary ids; later ones may differ.
        num_items: vocabulary size.
    """

    layers: str
    items: str
    num_items: int


class _Weights(NamedTuple):
    """The state of a base model's weights, and the fingerprints of this state by `num_items`."""

    ids: list[int]
    plain: bool
    state: list[tuple[int, int]]
    optimizer_steps: int
    fingerprints: dict[int, WeightsFingerprint]


_WEIGHTS: WeakKeyDictionary = WeakKeyDictionary()  # of each base model


@torch.compiler.disable
def weights_fingerprint(model: nn.Module, num_items: int | None = None) -> WeightsFingerprint:
    """
    The fingerprint of a base model's weights: of values and shapes, on any device. float16 and bfloat16 count as the
    same values in float32. It is cached until a weight is replaced or changed in place (a change through `.data`, which
    PyTorch does not record, is not noticed).

    Args:
        num_items: number of rows of the item embedding to read. Defaults to all.
    """
    num_items = model.config.vocab_size if num_items is None else num_items
    known, modules = _WEIGHTS.get(model), _modules(model)
    tensors = _tensors(modules)
    ids = [*map(id, modules), *map(id, tensors)]
    if known is not None and known.ids == ids:
        plain = known.plain
    else:
        plain = all(type(x) in _PLAIN and not x.is_inference() for x in tensors)
    state = [(x.data_ptr(), x._version) for x in tensors] if plain else [tensor_state(x)[:2] for x in tensors]
    steps = _optimizer_steps
    if known is None or known.ids != ids or known.state != state or known.optimizer_steps != steps:
        known = _WEIGHTS[model] = _Weights(ids, plain, state, steps, {})
    if num_items not in known.fingerprints:
        known.fingerprints[num_items] = _fingerprint(model, num_items)
    return known.fingerprints[num_items]


def tensor_state(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Numbers that change if a tensor gets other memory or is changed in place, or if an optimizer makes a step."""
    place = tensor.data_ptr() if type(tensor) in _PLAIN else id(tensor)
    return place, 0 if tensor.is_inference() else tensor._version, _optimizer_steps


def _fingerprint(model: nn.Module, num_items: int) -> WeightsFingerprint:
    layers, items, state = [], [], model.state_dict()

    def value_of(name: str) -> Any:
        value = state[name]
        return offloaded_tensor(model, name) if isinstance(value, torch.Tensor) and value.is_meta else value

    for name in sorted(state):
        value = value_of(name)
        column, _, part = name.rpartition(".")
        part = part if name.startswith("item_features.") else None
        if name == "item_embedding.weight" or part == "table":
            items.append((name, value[:num_items]))
        elif part == "offsets":
            items.append((name, value[: num_items + 1]))
        elif part == "codes":
            items.append((name, value[: int(value_of(f"{column}.offsets")[num_items])]))
        elif not name.startswith("log_statistics."):
            layers.append((name, value))
    return WeightsFingerprint(digest(layers), digest(items), num_items)


def items_fingerprint(vectors: torch.Tensor) -> str:
    """The fingerprint of item vectors `[vocab_size, hidden_size]`, with which an item index is compared."""
    return digest([("items", vectors)])


def offloaded_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that `accelerate` has moved to the CPU or to disk."""
    module, _, weight = name.rpartition(".")
    for hook in _hooks(model.get_submodule(module)):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[weight]
    raise ValueError(f"`{name}` has no values (it is on the meta device); load the model's weights first.")


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of `accelerate` on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def digest(tensors: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 of named values: tensors (see `weights_fingerprint`), tuples of them, and anything with a `repr`."""
    sha = hashlib.sha256()
    for name, value in tensors:
        _add(sha, name, value)
    return sha.hexdigest()


def _add(sha: Any, name: str, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            _add(sha, f"{name}.{i}", part)
    elif not isinstance(value, torch.Tensor):
        sha.update(f"{name} {value!r}\n".encode())
    elif type(value) not in _PLAIN and hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:  # a quantized tensor is made of plain ones
            _add(sha, f"{name}.{part}", getattr(value, part))
    else:
        value = value.detach().dequantize() if value.is_quantized else value.detach()
        half = value.dtype in (torch.float16, torch.bfloat16)
        sha.update(f"{name} {tuple(value.shape)} {torch.float32 if half else value.dtype}\n".encode())
        for part in value.flatten().split(_DIGEST_ELEMENTS):
            part = part.float() if half else part
            sha.update(part.cpu().contiguous().view(torch.uint8).numpy())
