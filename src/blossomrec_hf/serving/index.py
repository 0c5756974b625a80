"""
Approximate search in a catalogue of millions of items, through FAISS (extra `index`):

    index = ItemIndex.build(model)
    index.save("path/of/the/checkpoint")
    index = ItemIndex.load("path/of/the/checkpoint", model)
    model.recommend(histories, index=index)

The index finds candidates, more than are wanted; `recommend` scores them exactly and ranks them as it ranks a catalogue.
"""

import json
import os
import weakref
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.manifest_blossomrec import sha256
from ..model.modules_blossomrec import digest, stored_item_vectors, tensor_state
from ..utils.files import atomic_write, write_json


try:
    import faiss
except ImportError:
    faiss = None


INDEX_FILE, ABOUT_FILE = "item_index.faiss", "item_index.json"
LISTS = 8  # times the root of the number of items; FAISS advises 4 to 16
SAMPLE, KMEANS_STEPS = 40, 6  # items a list that centroids are learned from, and how often these move


class ItemIndex:
    """
    The items of a model in lists around centroids (an inverted file), eight bits a number: a search compares with the
    centroids and reads the `probes` nearest lists. Takes about 1.1 bytes a number of the embedding.

    Args:
        index: a FAISS index of inner products, entry i for item i + 2.
        fingerprint: digest of the item embedding it was built from.
        probes: lists read in a search; more find more and take longer.
    """

    def __init__(self, index: "faiss.IndexIVF", fingerprint: str, *, probes: int = 64) -> None:
        if probes < 1:
            raise ValueError(f"`probes` is {probes}; it must be at least 1.")
        self.index, self.fingerprint = index, fingerprint
        self.probes = probes
        self._checked: tuple[weakref.ref, tuple[int, int]] | None = None

    @property
    def probes(self) -> int:
        """Lists read in a search."""
        return self.index.nprobe

    @probes.setter
    def probes(self, value: int) -> None:
        self.index.nprobe = min(value, self.index.nlist)

    @classmethod
    def build(
        cls, model: PreTrainedModel, *, lists: int | None = None, probes: int = 64, seed: int = 0
    ) -> "ItemIndex":
        """
        Builds the index from the output embedding of `model`.

        Args:
            lists: number of lists; about 8·√items where it is `None`. More make a search faster and the build slower.
            probes: lists read in a search.
            seed: of the draw that the centroids are learned from.

        Raises:
            ValueError: more lists than items, or embeddings that are not finite.
            ImportError: FAISS is not installed.
        """
        _require_faiss()
        weight = stored_item_vectors(model).detach()
        items = weight[NUM_SPECIAL_IDS:].float().cpu().contiguous()
        if not bool(items.isfinite().all()):
            raise ValueError("`model` has item embeddings that are not finite; an index of them finds nothing.")
        lists = min(len(items), int(LISTS * len(items) ** 0.5)) if lists is None else lists
        if not 1 <= lists <= len(items):
            raise ValueError(f"`lists` is {lists}; it must lie in 1 … {len(items)}, the items.")
        width = items.shape[1]
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = seed, KMEANS_STEPS, 1
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(len(items), generator=generator)[: max(SAMPLE * lists, 1000)]
        index.train(items[sample].numpy())
        index.add(items.numpy())
        return cls(index, _digest(weight), probes=probes)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `item_index.faiss` and `item_index.json` to a folder, whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"embedding": self.fingerprint, "probes": self.probes}
        with atomic_write(folder / INDEX_FILE) as partial:
            faiss.write_index(self.index, str(partial))
            about["file"] = sha256(partial)
        write_json(folder / ABOUT_FILE, about)

    @classmethod
    def load(cls, folder: str | os.PathLike, model: PreTrainedModel) -> "ItemIndex":
        """
        The index that was saved in a folder.

        Raises:
            ValueError: it was built from other embeddings than those of `model`, or a file is damaged or not the one
                that was saved with the other.
            FileNotFoundError: the folder has none.
            ImportError: FAISS is not installed.
        """
        _require_faiss()
        folder = Path(folder)
        if not (folder / INDEX_FILE).is_file() or not (folder / ABOUT_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} has no item index; make one with `ItemIndex.build(model).save(folder)`."
            )
        try:
            about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
            fingerprint, probes, digest_of_file = about["embedding"], about["probes"], about["file"]
            sound = type(probes) is int and probes >= 1 and digest_of_file == sha256(folder / INDEX_FILE)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(
                f"{folder / INDEX_FILE} and {ABOUT_FILE} are damaged, or were not saved together; build the index again "
                "with `ItemIndex.build(model).save(folder)`."
            )
        index = cls(faiss.read_index(str(folder / INDEX_FILE)), fingerprint, probes=probes)
        index.check(stored_item_vectors(model))
        return index

    def check(self, weight: torch.Tensor) -> None:
        """
        Whether the index is one of this embedding; cheap as long as it is the same tensor, unchanged.

        Raises:
            ValueError: it is not.
        """
        # A reference and not an id, which another model's embedding may get when this one is gone.
        state = tensor_state(weight)
        if self._checked is not None and self._checked[0]() is weight and self._checked[1] == state:
            return
        if _digest(weight) != self.fingerprint:
            raise ValueError(
                "The index is stale: it was built from other item embeddings than the model has. Build it again "
                "with `ItemIndex.build(model)`."
            )
        self._checked = (weakref.ref(weight), state)

    def search(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """
        About the `count` best items for each of `states` `[S, hidden_size]`: vocabulary ids `[S, count]` int64 on the
        device of `states`, −1 where the lists that were read hold no more.
        """
        count = min(count, self.index.ntotal)
        # Threads share the lists of a single row, and otherwise the rows.
        self.index.parallel_mode = int(states.shape[0] == 1)
        _, found = self.index.search(states.detach().float().cpu().numpy(), count)
        found = torch.from_numpy(found).to(states.device)
        return torch.where(found < 0, -1, found + NUM_SPECIAL_IDS)


def _digest(weight: torch.Tensor) -> str:
    return digest([("items", weight)])


def _require_faiss() -> None:
    if faiss is None:
        raise ImportError("An item index needs FAISS: `pip install blossomrec-hf[index]`.")
