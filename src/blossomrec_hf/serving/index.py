"""
Approximate search in a catalog of millions of items with FAISS (extra `index`):

    index = ItemIndex.build(model)
    index.save("path/to/checkpoint")
    index = ItemIndex.load("path/to/checkpoint", model)
    model.recommend(histories, index=index)

The index returns more candidates than needed. The model scores them exactly and ranks them as it ranks a whole
catalog. `similar_items` requires an index of its own, `ItemIndex.build(model, scoring="cosine")`.
"""

import json
import os
import weakref
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.manifest_blossomrec import sha256
from ..model.modules_blossomrec import items_fingerprint, stored_item_vectors, tensor_state
from ..utils.files import atomic_write, write_json


try:
    import faiss
except ImportError:
    faiss = None


SCORINGS = {"dot": "`recommend`", "cosine": "`similar_items`"}  # and the methods that require them
INDEX_FILE, ABOUT_FILE = "item_index.faiss", "item_index.json"
LISTS = 8  # times the square root of the number of items; FAISS advises 4 to 16
SAMPLE, KMEANS_STEPS = 40, 6  # items per list that centroids are learned from, and iterations
MARGIN = (
    0.25  # share by which the encoded range extends beyond that of the sample on each side; values outside are clipped
)


class ItemIndex:
    """
    An inverted file index of the item vectors of a model, with eight bits per element. A search compares the query with all
    centroids and reads the `probes` nearest lists. Memory: about 1.1 bytes per element of the item vectors.

    Args:
        index: a FAISS index of inner products, in which entry i is the item i + 2.
        fingerprint: digest of the item vectors that the index was built from.
        scoring: "dot" if the entries are the item vectors, for `recommend`; "cosine" if they are scaled to length 1,
            for `similar_items`.
        probes: number of lists read per search. Higher values increase recall and latency.
    """

    def __init__(
        self, index: "faiss.IndexIVF", fingerprint: str, *, scoring: Literal["dot", "cosine"] = "dot", probes: int = 64
    ) -> None:
        if probes < 1:
            raise ValueError(f"`probes` is {probes}; it must be at least 1.")
        self.index, self.fingerprint, self.scoring = index, fingerprint, scoring
        self.probes = probes
        self._checked: tuple[weakref.ref, tuple[int, int, int]] | None = None

    @property
    def probes(self) -> int:
        """Number of lists read per search."""
        return self.index.nprobe

    @probes.setter
    def probes(self, value: int) -> None:
        self.index.nprobe = min(value, self.index.nlist)

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        *,
        scoring: Literal["dot", "cosine"] = "dot",
        lists: int | None = None,
        probes: int = 64,
        seed: int = 0,
    ) -> "ItemIndex":
        """
        Build the index from the item vectors of `model`.

        Args:
            scoring: "dot" for `recommend`, "cosine" for `similar_items`.
            lists: number of lists. Defaults to about 8·√items. Higher values make searches faster and the build slower.
            probes: number of lists read per search.
            seed: seed of the sample that the centroids are learned from.

        Raises:
            ValueError: if `scoring` has another value, there are more lists than items, or item vectors are not finite.
            ImportError: if FAISS is not installed.
        """
        _require_faiss()
        if scoring not in SCORINGS:
            raise ValueError(
                f'`scoring` is {scoring!r}; it must be "dot" (`recommend`) or "cosine" (`similar_items`).'
            )
        weight = stored_item_vectors(model).detach()
        items = weight[NUM_SPECIAL_IDS:].float().cpu().contiguous()
        if not bool(items.isfinite().all()):
            raise ValueError("`model` has item vectors that are not finite; load a valid checkpoint.")
        lists = min(len(items), int(LISTS * len(items) ** 0.5)) if lists is None else lists
        if not 1 <= lists <= len(items):
            raise ValueError(f"`lists` is {lists}; it must be between 1 and {len(items)}, the number of items.")
        if scoring == "cosine":
            items = torch.nn.functional.normalize(items, dim=1)
        width = items.shape[1]
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = seed, KMEANS_STEPS, 1
        index.sq.rangestat_arg = MARGIN
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(len(items), generator=generator)[: max(SAMPLE * lists, 1000)]
        index.train(items[sample].numpy())
        index.add(items.numpy())
        return cls(index, items_fingerprint(weight), scoring=scoring, probes=probes)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `item_index.faiss` and `item_index.json` to a folder, each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"embedding": self.fingerprint, "scoring": self.scoring, "probes": self.probes}
        with atomic_write(folder / INDEX_FILE) as partial:
            faiss.write_index(self.index, str(partial))
            about["file"] = sha256(partial)
        write_json(folder / ABOUT_FILE, about)

    @classmethod
    def load(cls, folder: str | os.PathLike, model: PreTrainedModel) -> "ItemIndex":
        """
        Load an index from the folder in which it was saved.

        Raises:
            ValueError: if it was built from other item vectors than those of `model`, or if its files are damaged or were not
                saved together.
            FileNotFoundError: if the folder has no index.
            ImportError: if FAISS is not installed.
        """
        _require_faiss()
        folder = Path(folder)
        if not (folder / INDEX_FILE).is_file() or not (folder / ABOUT_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} has no item index; build one with `ItemIndex.build(model).save(folder)`."
            )
        try:
            about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
            fingerprint, scoring, probes = about["embedding"], about["scoring"], about["probes"]
            sound = scoring in SCORINGS and type(probes) is int and probes >= 1
            sound = sound and about["file"] == sha256(folder / INDEX_FILE)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(
                f"{folder / INDEX_FILE} and {ABOUT_FILE} are damaged, or were not saved together; build the index again "
                "with `ItemIndex.build(model).save(folder)`."
            )
        index = cls(faiss.read_index(str(folder / INDEX_FILE)), fingerprint, scoring=scoring, probes=probes)
        index.check(stored_item_vectors(model))
        return index

    def check(self, weight: torch.Tensor, *, scoring: str | None = None) -> None:
        """
        Check that the index was built from these item vectors and, if given, for this scoring. Repeated checks of an
        unchanged tensor are cheap.

        Raises:
            ValueError: if it was not.
        """
        if scoring not in (None, self.scoring):
            raise ValueError(
                f'`index` was built with scoring="{self.scoring}", but {SCORINGS[scoring]} requires '
                f'`ItemIndex.build(model, scoring="{scoring}")`.'
            )
        # A weak reference and not an id, which could be reused by another tensor.
        state = tensor_state(weight)
        if self._checked is not None and self._checked[0]() is weight and self._checked[1] == state:
            return
        if items_fingerprint(weight) != self.fingerprint:
            raise ValueError(
                "The index is stale: it was built from other item vectors than the model has. Build it again with "
                "`ItemIndex.build(model)`."
            )
        self._checked = (weakref.ref(weight), state)

    def search(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """
        Search approximately the `count` best items for each of `states` `[S, hidden_size]`. Returns vocabulary ids
        `[S, count]` int64 on the device of `states`, padded with −1 if the lists read contain fewer items.
        """
        count = min(count, self.index.ntotal)
        # Parallelize over lists for a single row, and over rows otherwise.
        self.index.parallel_mode = int(states.shape[0] == 1)
        _, found = self.index.search(states.detach().float().cpu().numpy(), count)
        found = torch.from_numpy(found).to(states.device)
        return torch.where(found < 0, -1, found + NUM_SPECIAL_IDS)


def _require_faiss() -> None:
    if faiss is None:
        raise ImportError("An item index requires FAISS: `pip install blossomrec-hf[index]`.")
