"""Item vectors: unit vectors for cosine scores, and matrices that are kept while no weight changes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .id_lists_blossomrec import as_id_list
from .modules_blossomrec import all_vectors, dense_weight, is_plain, tensor_state


MIN_NORM = 1e-12  # vectors of a smaller norm count as zero


def unit_vectors(vectors: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """
    Vectors of length `scale`, computed in float32 or better; a vector of zeros stays one and gets no gradient.

    Args:
        vectors: `[..., hidden_size]`.

    Returns:
        the same shape and dtype.
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factors = torch.where(norms > MIN_NORM, scale / norms.clamp(min=MIN_NORM), 0.0)
    return (wide * factors).to(vectors.dtype)


class _Kept(NamedTuple):
    """A matrix, the tensors that it was computed from, and their states at that time."""

    matrix: torch.Tensor
    sources: list[torch.Tensor]  # aliases, so that their memory is not used again while the matrix is kept
    identities: list[torch.Tensor]
    states: list[tuple[int, int, int]]


class KeptMatrix:
    """
    A matrix that is computed from weights. In evaluation mode without gradients it is kept until a weight is replaced or
    changed in place (a change through `.data`, which PyTorch does not record, is not noticed). Threads may share it.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __deepcopy__(self, memo: dict) -> "KeptMatrix":
        return KeptMatrix()

    def __reduce__(self) -> tuple:
        return KeptMatrix, ()

    def drop(self) -> None:
        """Free the memory."""
        self._kept = None

    def get(
        self, module: nn.Module, sources: Sequence[torch.Tensor], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """
        The matrix that `compute` returns.

        Args:
            module: whose mode decides whether the matrix is kept.
            sources: the weights that it depends on.
        """
        if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not _can_watch(sources):
            return compute()
        kept, states = self._kept, [tensor_state(x) for x in sources]
        if kept is None or kept.states != states or any(a is not b for a, b in zip(kept.identities, sources)):
            # A matrix of inference mode could not be watched itself.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(sources[0].device.type, enabled=False):
                matrix = compute()
            kept = self._kept = _Kept(matrix, [x.detach() for x in sources], list(sources), states)
        return kept.matrix


def _can_watch(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether changes of these tensors are noticed: not those of offloaded weights, or of gathered ones (FSDP)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not any(x.is_meta or x.is_inference() for x in tensors)


class ItemVectorsMixin:
    """`item_vectors` of a base model with an `item_embedding` and, with features, `item_features`."""

    def train(self, mode: bool = True) -> "ItemVectorsMixin":
        """As in PyTorch; training mode drops the item vectors that are kept in evaluation mode."""
        if mode:
            self._all_vectors.drop()
            if self.item_features is not None:
                self.item_features.require_features()  # compiled code does not
        return super().train(mode)

    def item_vectors(
        self, ids: torch.LongTensor | Sequence[int] | None = None, *, training: bool = False
    ) -> torch.Tensor:
        """
        The vectors of items as the first layer reads them: id embeddings and, with `config.item_features`, the vectors of
        their categories and the projections of their dense vectors.

        Args:
            ids (`torch.LongTensor` or `list[int]` `[N]`, *optional*): vocabulary ids. Defaults to the whole vocabulary.
            training (`bool`, defaults to `False`): whether id embeddings are omitted with `config.id_dropout_prob`.

        Returns:
            `[vocab_size, hidden_size]` or `[N, hidden_size]`, differentiable. With features, the vectors of all items are
            computed, and in evaluation mode without gradients they are kept until a weight changes.

        Raises:
            ValueError: if `ids` is not one list of vocabulary ids, and for features that were never set.
        """
        if self.item_features is None:
            vectors = all_vectors(self.item_embedding, self.config.vocab_size)
        elif training:
            vectors = self._add_features(self.config.id_dropout_prob)
        else:
            parts = (self.item_embedding, self.item_features)
            sources = [x for part in parts for x in (*part.parameters(), *part.buffers())]
            vectors = self._all_vectors.get(self, sources, self._add_features)
        return vectors if ids is None else vectors[as_id_list(ids, vectors.device, self.config.vocab_size)]

    def _add_features(self, id_dropout_prob: float = 0.0) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.item_features.require_features()
        vectors = all_vectors(self.item_embedding, self.config.vocab_size)
        features = self.item_features().to(device=vectors.device, dtype=vectors.dtype)
        if id_dropout_prob > 0:
            kept = torch.rand(vectors.shape[0], 1, device=vectors.device) >= id_dropout_prob
            vectors = torch.where(kept, vectors, 0.0)
        return vectors + features

    def look_up(self, ids: torch.Tensor, training: bool, item_vectors: torch.Tensor | None) -> torch.Tensor:
        """The vectors of the input items."""
        if self.item_features is None:
            return self.item_embedding(ids)
        vectors = self.item_vectors(training=training) if item_vectors is None else item_vectors
        if is_plain(self.item_embedding):
            return self.item_embedding(ids, vectors)
        return nn.functional.embedding(ids.to(vectors.device), vectors)


class ItemScoresMixin:
    """`item_vectors` and logits of a model with a base model and, without features, an `lm_head`."""

    def item_vectors(
        self,
        ids: torch.LongTensor | Sequence[int] | None = None,
        *,
        input_vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The vectors whose dot products with the prediction states are the logits. With `tie_word_embeddings=True` they are
        the vectors of the input (`model.model.item_vectors()`), otherwise weights of their own; with `scoring="cosine"`, they
        are scaled to length 1. All scores, losses and indexes use this method.

        Args:
            ids (`torch.LongTensor` or `list[int]` `[N]`, *optional*): vocabulary ids. Defaults to the whole vocabulary.
            input_vectors (`torch.Tensor` `[vocab_size, hidden_size]`, *optional*): with `config.item_features`, the vectors
                of the input, if they are known.

        Returns:
            `[vocab_size, hidden_size]` or `[N, hidden_size]`, differentiable, in the dtype of the weights. Without `ids`,
            features and cosine scores, this is the weight itself, or computed if the output embedding is offloaded,
            quantized or adapted. In evaluation mode without gradients, computed vectors are kept until a weight changes.

        Raises:
            ValueError: if `ids` is not one list of vocabulary ids.
        """
        if self.lm_head is not None:
            vectors = dense_weight(self.lm_head)
        else:
            vectors = self.model.item_vectors() if input_vectors is None else input_vectors
        if self.config.scoring == "cosine":
            raw = vectors
            vectors = self._unit_vectors.get(self, [raw], lambda: unit_vectors(raw))
        return vectors if ids is None else vectors[as_id_list(ids, vectors.device, self.config.vocab_size)]

    def logits(self, states: torch.Tensor, input_vectors: torch.Tensor | None) -> torch.Tensor:
        """The scores of all items for prediction states."""
        if self.config.scoring == "dot" and self.lm_head is not None:
            return self.lm_head(states)
        vectors = self.item_vectors(input_vectors=input_vectors)
        return nn.functional.linear(states.to(vectors.device), vectors)

    def train(self, mode: bool = True) -> "ItemScoresMixin":
        """As in PyTorch; training mode drops the item vectors that are kept in evaluation mode."""
        if mode:
            self._unit_vectors.drop()
        return super().train(mode)
