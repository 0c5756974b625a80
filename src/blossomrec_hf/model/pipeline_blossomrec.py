"""`pipeline("sequential-recommendation")`: raw item ids in, raw item ids and scores out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Pipeline
from transformers.utils import logging


logger = logging.get_logger(__name__)

_INPUT_KEYS = {"history", "candidates", "exclude"}


class SequentialRecommendationPipeline(Pipeline):
    """
    Recommend the next items of histories of raw ids.

    ```python
    recommender = pipeline("sequential-recommendation", model="path/or/repository")
    recommender([12, 15, 3], top_k=5)  # one history: [{"item": 7, "score": 4.2}, …]
    recommender([[12, 15, 3], [8]], batch_size=32)  # several: a list of such lists
    recommender({"history": [12, 15, 3], "candidates": [7, 9], "exclude": [9]})
    recommender([[12, 15, 3], [8]], candidates=[7, 9, 20], exclude=[9])  # the same for all inputs
    ```

    An input is a list of raw ids (of the tokenizer's `item_type`), the oldest first, or a dictionary with `history` and,
    optionally, `candidates` to choose from and items to `exclude`. A list of inputs, a `Dataset` and a generator are
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

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        exclude_seen: bool | None = None,
        min_score: float | None = None,
        max_length: int | None = None,
        candidates: Sequence | None = None,
        exclude: Sequence | None = None,
    ) -> tuple[dict, dict, dict]:
        chosen = {"candidates": candidates, "exclude": exclude}
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
                inputs = {"history": inputs}
        elif hasattr(inputs, "tolist"):
            inputs = {"history": inputs} if inputs.ndim == 1 else list(inputs)
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

    def preprocess(
        self, inputs: list, candidates: Sequence | None = None, exclude: Sequence | None = None
    ) -> dict[str, Any]:
        """
        Encode several inputs as padded tensors: `input_ids`, `exclude_ids`, `candidate_ids` `[B, …]` int64, and `chooses`
        `[B]` bool, the inputs with candidates of their own.
        """
        columns: dict[str, list[list[int]]] = {name: [] for name in _INPUT_KEYS}
        chooses, unknown = [], 0
        shared_exclude = self._encode("exclude", exclude)
        for entry in inputs:
            if not isinstance(entry, Mapping):
                entry = {"history": entry}
            if "history" not in entry or entry.keys() - _INPUT_KEYS:
                raise ValueError(
                    f"`inputs` contains a dictionary with {', '.join(map(repr, entry))}; it may have 'history', which it "
                    "must, 'candidates' and 'exclude'."
                )
            if entry.get("candidates") is None:
                entry = {**entry, "candidates": candidates}
            for name in _INPUT_KEYS:
                columns[name].append(self._encode(name, entry.get(name)))
            columns["exclude"][-1] += shared_exclude
            chooses.append(entry["candidates"] is not None)
            unknown += columns["candidates"][-1].count(self.tokenizer.unk_token_id)
        if unknown:
            logger.warning(f"Dropped {unknown} unknown items from the candidates.")

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value)

        return {
            "input_ids": pad(columns["history"], self.tokenizer.pad_token_id),
            "exclude_ids": pad(columns["exclude"], -1),
            "candidate_ids": pad(columns["candidates"], -1),
            "chooses": torch.tensor(chooses),
        }

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
                out = self.model.recommend(
                    encoded["input_ids"][rows],
                    exclude_ids=encoded["exclude_ids"][rows],
                    candidate_ids=candidates,
                    **kwargs,
                )
                item_ids[rows.cpu()], scores[rows.cpu()] = out.item_ids.cpu(), out.scores.cpu().float()
        return {"item_ids": item_ids, "scores": scores}

    def postprocess(self, outputs: dict[str, torch.Tensor]) -> list[list[dict[str, Any]]]:
        answers = []
        for ids, scores in zip(outputs["item_ids"].tolist(), outputs["scores"].tolist()):
            count = len(ids) - ids.count(-1)  # those come last
            items = self.tokenizer.decode_items(ids[:count])
            answers.append([{"item": item, "score": score} for item, score in zip(items, scores)])
        return answers
