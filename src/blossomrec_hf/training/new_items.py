"""A catalog that grows: new items in tokenizer and model, with vectors that are given or follow from their events."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from ..batches import HistoryStore, budget_batches
from ..data.intervals import are_intervals, interval_of
from ..evaluation.ranking import evaluating
from ..model.features_blossomrec import ItemFeatures
from ..model.packing_blossomrec import pack_histories
from ..model.tokenization_blossomrec import BlossomRecTokenizer


logger = logging.getLogger(__name__)

SHRINKAGE = 3.0  # events: the mean over n events counts n / (n + this), the mean over all items the rest
RIDGE = 0.1  # penalty of the map from events to vectors, in units of the features' mean variance


def add_items(
    model: PreTrainedModel,
    tokenizer: BlossomRecTokenizer,
    items: Sequence[Any],
    *,
    vectors: Mapping[str, np.ndarray] | None = None,
    features: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """
    Adds the items that the catalog does not have yet. The rows of the old items stay as they are.

    Args:
        items: raw item ids.
        vectors: the initial vector of an item, float [hidden_size], by its raw id, also as text (see
            [`read_item_vectors`]). Other new items start at the mean of the old ones; [`initialize_from_events`] places
            them better.
        features: for a model with `config.item_features`, the features of an item by its raw id, also as text, a value by
            column: a category, a list of categories, or a vector. The id embeddings of new items start at zero there, so
            that the items are recommended by their features at once. Categories that the model does not know count as
            unknown, with a warning, and missing values as no feature. In a column of `--item_numbers`, a number is in the
            category of its interval.

    Returns:
        how many were new.

    Raises:
        ValueError: for a tokenizer of another size than the model's vocabulary, for a vector of another width than the
            model's, or one that is not finite, for features that do not fit the model, and for ids that the vocabulary cannot
            have (see [`BlossomRecTokenizer.add_items`]). Nothing is changed then.
    """
    first_new, width = len(tokenizer), model.config.hidden_size
    if first_new != model.config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {first_new} ids, the model's vocabulary {model.config.vocab_size}; give the tokenizer that was "
            "saved with the model."
        )
    vectors = {str(item): np.asarray(vector) for item, vector in (vectors or {}).items()}
    for item, vector in vectors.items():
        if vector.shape != (width,):
            raise ValueError(
                f"`vectors` has {vector.shape} for the item {item!r}, but the model's `hidden_size` is {width}: bring "
                "the vectors to that width first, by PCA for example."
            )
        if not np.isfinite(vector).all():
            raise ValueError(f"`vectors` has numbers for the item {item!r} that are not finite; remove them.")
    features = {} if features is None else features
    known = model.config.item_features
    _check_features(features, known)
    features = _with_intervals(features, known)
    _check_values(features, known)
    num_added = tokenizer.add_items(items)
    if num_added:
        model.resize_token_embeddings(len(tokenizer))
        new_ids = range(first_new, len(tokenizer))
        given = [
            (row, vectors[str(item)])
            for row, item in zip(new_ids, tokenizer.decode_items(new_ids))
            if str(item) in vectors
        ]
        if given:
            rows, values = zip(*given)
            with torch.no_grad():
                for table in _tables(model):
                    table[list(rows)] = torch.from_numpy(np.stack(values)).to(table)
        if features:
            rows = [features.get(str(item), {}) for item in tokenizer.decode_items(new_ids)]
            _report_unknown_categories(rows, known)
            model.set_item_features(_features_of(rows, known), first_id=first_new)
    return num_added


def _check_features(features: Any, known: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Raise `ValueError` for features by raw id that are not those of a model."""
    if not isinstance(features, Mapping) or not all(isinstance(row, Mapping) for row in features.values()):
        raise ValueError(
            f"`features` is {features!r:.80}; it must be a dictionary by raw id of dictionaries by column, such as "
            "{'42': {'genre': 'Drama'}}."
        )
    if features and known is None:
        raise ValueError(
            "`features` are given, but the model has no `config.item_features`; omit them, or train a new model."
        )
    for item, row in features.items():
        if unknown := [name for name in row if name not in known]:
            raise ValueError(
                f"`features[{item!r}]` has the column {unknown[0]!r}; the columns of the model are {', '.join(known)}."
            )


def _with_intervals(
    features: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """The features, by raw id as text, with the intervals of numbers where the categories of a model are intervals."""
    columns = {name for name, feature in (known or {}).items() if are_intervals(feature.get("names", ()))}
    return {
        str(item): {
            name: interval_of(value) if name in columns and _is_number(value) else value for name, value in row.items()
        }
        for item, row in features.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_values(features: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Raise `ValueError` that names the first item with values that a model cannot read."""
    try:
        _features_of(features.values(), known)
    except (TypeError, ValueError):
        for item, row in features.items():
            try:
                _features_of([row], known)
            except (TypeError, ValueError) as error:
                reason = str(error).replace(" for item 0", "")
                raise ValueError(f"`features[{item!r}]` cannot be read: {reason}") from error
        raise


def _features_of(
    rows: Iterable[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]] | None
) -> ItemFeatures | None:
    rows = list(rows)
    if known is None or not rows:
        return None
    return ItemFeatures.from_columns({name: [row.get(name) for row in rows] for name in known}, known=known)


def _report_unknown_categories(rows: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> None:
    """Log the categories of new items that a model does not know."""
    for name, feature in known.items():
        if feature["kind"] != "categories":
            continue
        values = [row[name] for row in rows if row.get(name) is not None]
        lists = [value if np.ndim(value) or isinstance(value, set | frozenset) else [value] for value in values]
        given = {str(category) for categories in lists for category in categories}
        if unknown := sorted(given.difference(feature["names"])):
            logger.warning(
                "%d of %d categories of the new items in %r are unknown to the model, such as %r; it knows %s.",
                len(unknown),
                len(given),
                name,
                unknown[0],
                ", ".join(map(repr, feature["names"][:3])) + (", …" if len(feature["names"]) > 3 else ""),
            )


@torch.no_grad()
def initialize_from_events(
    model: PreTrainedModel, item_ids: Sequence[int], histories: HistoryStore, *, max_tokens: int = 65536
) -> None:
    """
    Initializes the vectors of new items from the events around theirs.

    An item is described by the mean hidden state before its events, the mean vector of the next items, and its number
    of events. A linear map from this description to the vector is fitted to the other items (ridge regression, an item
    with n events weighted by n / (n + `SHRINKAGE`)) and applied to the new ones. The model reads the histories without
    the new items. New items that no other item precedes or follows in a history are left as they are.

    Args:
        model: with rows for the new items already, see [`add_items`].
        item_ids: vocabulary ids of the new items.
        histories: all the histories to train on, with the columns that the model reads.
        max_tokens: items that the model reads at a time.
    """
    if not len(item_ids):
        return
    before, after = _sum_contexts(model, np.asarray(item_ids), histories, max_tokens)
    counts = before[:, -1:] + after[:, -1:]
    features = torch.cat([_shrunk_means(before), _shrunk_means(after), counts.log1p()], 1)
    weights = counts / (counts + SHRINKAGE)
    is_new = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    is_new[list(item_ids)] = True
    fitted = ~is_new & (counts[:, 0] > 0)
    placed = is_new & (counts[:, 0] > 0)
    if not (fitted.any() and placed.any()):
        return
    features = features / features[fitted].std(0, correction=0).clamp(min=1e-6)
    share = weights[fitted] / weights[fitted].sum()
    feature_mean = (share * features[fitted]).sum(0)
    centered = features - feature_mean
    gram = (share * centered[fitted]).T @ centered[fitted]
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    for table in _tables(model):
        vectors = table[fitted].to(features.dtype)
        mean = (share * vectors).sum(0)
        slope = torch.linalg.solve(gram, (share * centered[fitted]).T @ (vectors - mean))
        table[placed] = (mean + centered[placed] @ slope).to(table.dtype)


def _tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights with a learned row per item: one where input and output are tied, else two."""
    weights = [model.get_input_embeddings().weight]
    if model.get_output_embeddings() is not None:
        weights.append(model.get_output_embeddings().weight)
    return list({id(weight): weight for weight in weights}.values())


def _sum_contexts(
    model: PreTrainedModel, new_items: np.ndarray, histories: HistoryStore, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Two sums over the events of each item, float32 [vocab_size, hidden_size + 1]: of the hidden states before them, and
    of the output vectors of the items after them. The last column is the number of terms.
    """
    lengths = histories.lengths
    offsets = np.append(0, np.cumsum(lengths))
    places = np.arange(offsets[-1]) + np.repeat(histories.starts - offsets[:-1], lengths)
    items = histories.items.cpu().numpy()[places]
    is_known = ~np.isin(items, new_items)
    known_before = np.append(0, np.cumsum(is_known))
    known_items, known_offsets = items[is_known], known_before[offsets]
    begins, ends = (np.repeat(known_offsets[bounds], lengths) for bounds in (slice(None, -1), slice(1, None)))
    last, following = known_before[:-1] - 1, known_before[1:]  # the known events around each event
    has_last, has_following = last >= begins, following < ends

    device = next(model.parameters()).device
    output = model.item_vectors()
    sums = torch.zeros(2, model.config.vocab_size, model.config.hidden_size + 1, device=device)
    read = {name: histories.columns[name].cpu().numpy()[places][is_known] for name in model.config.event_columns}
    store = HistoryStore(known_items, known_offsets, columns=read).to(device)
    rows = np.flatnonzero(store.lengths)
    with evaluating(model):
        for part in budget_batches(store.lengths[rows], max_tokens):
            start, stop = known_offsets[rows[part][0]], known_offsets[rows[part][-1] + 1]
            known_histories = pack_histories(**store.pack(rows[part]), vocab_size=model.config.vocab_size)
            states = model.base_model.encode(known_histories).float()
            vectors = output[torch.from_numpy(known_items[start:stop]).to(device).long()].float()
            for total, values, place, exists in zip(
                sums, (states, vectors), (last, following), (has_last, has_following)
            ):
                first, end = np.searchsorted(place, [start, stop])
                events = first + np.flatnonzero(exists[first:end])
                event_items, event_places = (
                    torch.from_numpy(np.stack([items[events], place[events] - start])).to(device).long()
                )
                values = torch.nn.functional.pad(values, (0, 1), value=1.0)
                total.index_add_(0, event_items, values[event_places])
    return sums[0], sums[1]


def _shrunk_means(sums: torch.Tensor) -> torch.Tensor:
    """The means of [`_sum_contexts`] less that over all items, shrunk to 0 where an item has few events."""
    totals, counts = sums[:, :-1], sums[:, -1:]
    mean = totals.sum(0) / counts.sum().clamp(min=1)
    return (totals - counts * mean) / (counts + SHRINKAGE)


def read_item_vectors(path: str | Path) -> dict[str, np.ndarray]:
    """
    Reads one vector an item, by the item's raw id as text.

    Args:
        path: a Parquet file with the columns `item` and `vector` (lists of numbers), or a safetensors file with one
            tensor an item, named by it.

    Raises:
        ValueError: for another kind of file, a damaged one, or a Parquet file without these columns.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file ({error}); write it again.") from error
    if path.suffix != ".parquet":
        raise ValueError(f"`path` is {path}; item vectors are read from .parquet or .safetensors.")
    import polars as pl  # not needed to train

    from ..data.parts import reading

    with reading(str(path)):
        table = pl.read_parquet(path, glob=False)
    if missing := {"item", "vector"} - set(table.columns):
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; it has {', '.join(table.columns)}.")
    return {
        str(item): np.asarray(vector, dtype=np.float32) for item, vector in table.select("item", "vector").iter_rows()
    }


def freeze_all_but_items(model: PreTrainedModel, first_item: int) -> None:
    """
    Leaves only the embeddings of the items from vocabulary id `first_item` on to be trained (2: of all items). The
    gradient of the rows before is set to zero, so an optimizer must not decay them.
    """
    model.requires_grad_(False)
    for weight in _tables(model):
        weight.requires_grad_(True)
        if first_item > 2:
            weight.register_hook(lambda gradient: torch.cat([gradient[:first_item] * 0, gradient[first_item:]]))
