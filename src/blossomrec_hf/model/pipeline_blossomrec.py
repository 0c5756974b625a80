"""`pipeline("sequential-recommendation")`: raw item ids in, raw item ids and scores out."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Pipeline
from transformers.utils import logging

from .ids_blossomrec import UNKNOWN_TIME, UNKNOWN_TYPE


logger = logging.get_logger(__name__)

_ITEM_KEYS = ("items", "candidates", "exclude")
_EVENT_KEYS = ("timestamps", "event_types", "now", "target_event_type")


class SequentialRecommendationPipeline(Pipeline):
    """
    Recommend the next items of histories of raw ids.

    ```python
    recommender = pipeline("sequential-recommendation", model="path/or/repository")
    recommender([12, 15, 3], top_k=5)  # one history: [{"item": 7, "score": 4.2}, …]
    recommender([[12, 15, 3], [8]], batch_size=32)  # several: a list of such lists
    recommender({"items": [12, 15, 3], "candidates": [7, 9], "exclude": [9]})
    recommender([[12, 15, 3], [8]], candidates=[7, 9, 20], exclude=[9])  # the same for all inputs
    recommender({"items": [12, 15], "timestamps": [1795680000, 1795766400], "now": 1795770000})  # model with times
    recommender({"items": [12, 15], "event_types": ["view", "cart"], "target_event_type": "buy"})  # model with event types
    recommender.similar_items([12, 15], top_k=5)  # the items that are most similar to each of two
    ```

    An input is a list of raw ids (of the tokenizer's `item_type`), the oldest first, or a dictionary with `items` and,
    optionally, `candidates` to choose from and items to `exclude`. For a model with `time_features`, it also has `timestamps`,
    one per item in seconds, and optionally `now`, the time for which to recommend; for a model with `event_types`, the names
    of the `event_types`, one per item, and optionally the `target_event_type` to recommend. Other models ignore these. A list of inputs, a `Dataset` and a generator are
    several inputs, read `batch_size` at a time. Items outside the vocabulary are dropped, with a warning that counts them.
    A history without known items gets the most frequent items of the training data.

    Args:
        top_k (`int`, *optional*, defaults to 10): number of items per history; fewer if fewer remain.
        exclude_seen (`bool`, *optional*): whether to exclude the items of the history itself. Defaults to
            `config.exclude_seen`, as in `recommend`.
        min_score (`float`, *optional*): exclude items of a lower score.
        max_length (`int`, *optional*): number of latest items of a history that the model reads. Defaults to all.
        candidates (`list`, *optional*): raw ids to choose from, for every input without `candidates` of its own.
        exclude (`list`, *optional*): raw ids to exclude for every input, in addition to its own `exclude`.
        now (`int`, *optional*): time in seconds for every input without `now` of its own. Defaults to unknown.
        target_event_type (`str`, *optional*): type to recommend for every input without one of its own. Defaults to the first
            of `config.target_event_types`, or to unknown.

    Raises:
        `ValueError`: for inputs of another form, ids of another type, a tokenizer of another size than the model's
            vocabulary, and as `recommend`.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "recommend"):
            raise ValueError(
                f"`model` is a {type(self.model).__name__}, which has no `recommend`; give a "
                "`BlossomRecForSequentialRecommendation`."
            )
        if self.tokenizer is None or len(self.tokenizer) != self.model.config.vocab_size:
            raise ValueError(
                f"`tokenizer` has {0 if self.tokenizer is None else len(self.tokenizer)} ids, the model's vocabulary "
                f"{self.model.config.vocab_size}; give the tokenizer that was saved with the model, or call "
                "`model.resize_token_embeddings(len(tokenizer))` after adding items."
            )

    def similar_items(
        self,
        items: Sequence,
        top_k: int = 10,
        *,
        candidates: Sequence | None = None,
        exclude: Sequence | None = None,
        min_score: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """
        Find the `top_k` items whose vectors have the highest cosine similarity to that of each item; the item itself is not
        returned.

        Args:
            items (`list`): raw ids.
            top_k (`int`, defaults to 10): number of similar items per item; fewer if fewer remain.
            candidates (`list`, *optional*): raw ids to choose from. Defaults to the catalog.
            exclude (`list`, *optional*): raw ids to exclude.
            min_score (`float`, *optional*): exclude items of a lower similarity.

        Returns:
            a list like `[{"item": 7, "score": 0.8}, …]` for each item, the most similar first.

        Raises:
            ValueError: for items outside the vocabulary, ids of another type, and as `model.similar_items`.
        """
        ids = self._encode("items", items)
        if unknown := [item for item, index in zip(items, ids) if index == self.tokenizer.unk_token_id]:
            raise ValueError(f"`items` contains {unknown[0]!r}, which is not in the model's vocabulary; remove it.")
        candidate_ids = None if candidates is None else self._encode("candidates", candidates)
        self._warn_of_unknown(candidate_ids or [])
        out = self.model.similar_items(
            ids, top_k, exclude_ids=self._encode("exclude", exclude), candidate_ids=candidate_ids, min_score=min_score
        )
        return self.postprocess({"item_ids": out.item_ids, "scores": out.scores})

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        exclude_seen: bool | None = None,
        min_score: float | None = None,
        max_length: int | None = None,
        candidates: Sequence | None = None,
        exclude: Sequence | None = None,
        now: int | None = None,
        target_event_type: str | None = None,
    ) -> tuple[dict, dict, dict]:
        chosen = {"candidates": candidates, "exclude": exclude, "now": now, "target_event_type": target_event_type}
        given = {"top_k": top_k, "exclude_seen": exclude_seen, "min_score": min_score, "max_length": max_length}
        chosen, given = ({name: x for name, x in values.items() if x is not None} for values in (chosen, given))
        return chosen, given, {}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> list | Iterator[list]:
        """Recommend for one input (a list of items and scores) or several (a list of such lists)."""
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list):
            if not inputs:
                return []
            if not any(
                isinstance(entry, (list, tuple, Mapping)) or hasattr(entry, "tolist") and getattr(entry, "ndim", 0)
                for entry in inputs
            ):
                inputs = {"items": inputs}
        elif hasattr(inputs, "tolist"):
            inputs = {"items": inputs} if inputs.ndim == 1 else list(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def get_iterator(
        self,
        inputs: Iterable,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[list[dict]]:
        # Batches are made here, not by a collator for tensors, because histories and candidates are ragged.
        inputs = iter(inputs)
        while batch := list(islice(inputs, batch_size)):
            encoded = self.preprocess(batch, **preprocess_params)
            yield from self.postprocess(self.forward(encoded, **forward_params), **postprocess_params)

    def run_single(
        self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict
    ) -> list[dict]:
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def preprocess(self, inputs: list, exclude: Sequence | None = None, **shared: Any) -> dict[str, Any]:
        """
        Encode several inputs as padded tensors: `input_ids`, `exclude_ids`, `candidate_ids` `[B, …]` int64, the columns of
        the events that the model reads, and `chooses` `[B]` bool, the inputs with candidates of their own.

        Args:
            exclude: raw ids to exclude for every input.
            shared: `candidates`, `now` and `target_event_type` for inputs without their own.
        """
        items: dict[str, list[list[int]]] = {name: [] for name in _ITEM_KEYS}
        chooses, entries, shared_exclude = [], [], self._encode("exclude", exclude)
        for entry in inputs:
            entry = entry if isinstance(entry, Mapping) else {"items": entry}
            if "items" not in entry or entry.keys() - {*_ITEM_KEYS, *_EVENT_KEYS}:
                raise ValueError(
                    f"`inputs` contains a dictionary with {', '.join(map(repr, entry))}; it must have 'items', and may have "
                    f"{', '.join(map(repr, (*_ITEM_KEYS[1:], *_EVENT_KEYS)))}."
                )
            entry = shared | {name: value for name, value in entry.items() if value is not None}
            for name in _ITEM_KEYS:
                items[name].append(self._encode(name, entry.get(name)))
            items["exclude"][-1] += shared_exclude
            chooses.append("candidates" in entry)
            entries.append(entry)
        self._warn_of_unknown([index for row in items["candidates"] for index in row])
        return {
            "input_ids": _pad(items["items"], self.tokenizer.pad_token_id),
            "exclude_ids": _pad(items["exclude"], -1),
            "candidate_ids": _pad(items["candidates"], -1),
            "chooses": torch.tensor(chooses),
            **self._encode_events(entries, [len(row) for row in items["items"]]),
        }

    def _encode_events(self, entries: list[Mapping], lengths: list[int]) -> dict[str, torch.Tensor]:
        """The columns of the events that the model reads, as `recommend` takes them."""
        config, encoded = self.model.config, {}
        if config.time_features:
            times = [_one_per_item(entry, "timestamps", n) for entry, n in zip(entries, lengths)]
            encoded["timestamps"] = _pad([[_seconds("timestamps", x) for x in row] for row in times], 0)
            now = [_seconds("now", entry["now"]) if "now" in entry else UNKNOWN_TIME for entry in entries]
            encoded["prediction_time"] = torch.tensor(now)
        if config.event_types:
            types = [_one_per_item(entry, "event_types", n) for entry, n in zip(entries, lengths)]
            _check_names("event_types", (name for row in types for name in row))
            ids = {name: i for i, name in enumerate(config.event_types)}
            encoded["event_type_ids"] = _pad([[ids.get(name, UNKNOWN_TYPE) for name in row] for row in types], 0)
            if unknown := sum(name not in ids for row in types for name in row):
                logger.warning(
                    f"{unknown} events have types that are not among {', '.join(ids)} and count as unknown."
                )
            targets = [entry.get("target_event_type") for entry in entries]
            for name in targets:
                if name is not None and (not isinstance(name, str) or name not in ids):
                    raise ValueError(
                        f"`target_event_type` is {name!r}; it must be one of {', '.join(map(repr, ids))}."
                    )
            default = config.default_target_type
            encoded["target_event_type"] = torch.tensor([default if name is None else ids[name] for name in targets])
        return encoded

    def _warn_of_unknown(self, candidate_ids: list[int]) -> None:
        if unknown := candidate_ids.count(self.tokenizer.unk_token_id):
            logger.warning(f"Dropped {unknown} unknown items from the candidates.")

    def _encode(self, name: str, items: Any) -> list[int]:
        if isinstance(items, (str, Mapping)) or not (items is None or hasattr(items, "__len__")):
            raise ValueError(f"`{name}` is {items!r}; it must be a list of raw item ids.")
        return [] if items is None else self.tokenizer.encode_items(items)

    def _forward(self, encoded: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        top_k = kwargs.setdefault("top_k", 10)
        item_ids = torch.full((len(encoded["chooses"]), top_k), -1)
        scores = torch.full(item_ids.shape, -torch.inf)
        for chooses in (False, True):  # without candidates of its own, a history chooses from the whole catalog
            rows = (encoded["chooses"] == chooses).nonzero()[:, 0]
            if len(rows):
                candidates = encoded["candidate_ids"][rows] if chooses else None
                columns = {name: x[rows] for name, x in encoded.items() if name not in ("chooses", "candidate_ids")}
                out = self.model.recommend(**columns, candidate_ids=candidates, **kwargs)
                item_ids[rows.cpu()], scores[rows.cpu()] = out.item_ids.cpu(), out.scores.cpu().float()
        return {"item_ids": item_ids, "scores": scores}

    def postprocess(self, outputs: dict[str, torch.Tensor]) -> list[list[dict[str, Any]]]:
        answers = []
        for ids, scores in zip(outputs["item_ids"].tolist(), outputs["scores"].tolist()):
            count = len(ids) - ids.count(-1)  # those come last
            items = self.tokenizer.decode_items(ids[:count])
            answers.append([{"item": item, "score": score} for item, score in zip(items, scores)])
        return answers


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value)


def _one_per_item(entry: Mapping, name: str, length: int) -> Sequence:
    """A column of the events of one input."""
    values = entry.get(name, [] if length == 0 else None)
    ordered = hasattr(values, "__len__") and not isinstance(values, (str, Mapping, Set))
    if not ordered or len(values) != length:
        raise ValueError(
            f"`{name}` is {values!r:.80} for {length} items; the model reads {name}, so give a dictionary with 'items' and "
            f"{name!r}, a list of the same length."
        )
    return values


def _check_names(name: str, values: Iterable) -> None:
    for value in values:
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"`{name}` contains {value!r:.80}; it must be the name of a type, or None if it is unknown."
            )


def _seconds(name: str, value: Any) -> int:
    try:
        seconds = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        seconds = None
    if seconds is None or not -(2**63) <= seconds < 2**63:
        raise ValueError(f"`{name}` contains {value!r:.80}; it must be an int64 number, seconds since 1970.")
    return seconds
