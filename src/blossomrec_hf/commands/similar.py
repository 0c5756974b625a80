"""
Print the items that are most similar to given items, as JSON lines with raw item ids.

    blossomrec similar 1193 661 --model runs/ml-1m --top_k 5
    blossomrec similar --items items.txt --candidates in_stock.txt --model runs/shop > similar.jsonl

Similarity is the cosine of the item vectors. Each item gives one line, the most similar item first:
{"item": 1193, "similar": [{"item": 527, "score": 0.71}, ...]}
"""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from .. import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from ..utils.command_line import HelpFormatter, exit_on_error, load_checkpoint
from ..utils.progress import set_up_logging


logger = logging.getLogger(__name__)

BATCH_SIZE = 1024  # items whose similarities are computed at a time


@dataclass
class SimilarArguments:
    """The model, the items and the number of similar items."""

    model: str = field(default="runs/blossomrec", metadata={"help": "Folder of a trained model, or a Hub id."})
    items: str | None = field(
        default=None, metadata={"help": "File of raw item ids, one per line, in place of ids as arguments."}
    )
    candidates: str | None = field(
        default=None,
        metadata={"help": "File of raw ids of items to choose from, one per line; by default, the catalog."},
    )
    top_k: int = field(default=10, metadata={"help": "Number of similar items per item; fewer if fewer remain."})


def read_ids(path: str) -> list[str]:
    """The lines of a UTF-8 text file that are not empty."""
    try:
        lines = [line for line in Path(path).read_text("utf-8-sig").split("\n") if line]
    except UnicodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; give a file of raw item ids, one per line.") from error
    if not lines:
        raise ValueError(f"{path} is empty; give a file of raw item ids, one per line.")
    return lines


def encode(tokenizer: BlossomRecTokenizer, texts: list[str]) -> tuple[list[int], str]:
    """The vocabulary ids of the items that the model has, and a description of the others, empty if there are none."""
    items: list[int | str] = list(texts)
    if tokenizer.item_type == "int":
        items = [int(text) if re.fullmatch("-?[0-9]+", text) else text for text in texts]
    ids = tokenizer.encode_items(items)
    unknown = [text for text, index in zip(texts, ids) if index == tokenizer.unk_token_id]
    listed = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
    description = f"{len(unknown)} of {len(ids)} items that are not in the model's vocabulary ({listed})"
    return [index for index in ids if index != tokenizer.unk_token_id], description if unknown else ""


@exit_on_error()
def main() -> None:
    parser = HfArgumentParser(SimilarArguments, description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("item", nargs="*", help="Raw item ids.")
    args, given = parser.parse_args_into_dataclasses()
    set_up_logging()
    if bool(given.item) == (args.items is not None):
        raise ValueError("Give either raw item ids as arguments, or a file of them with `items`.")
    texts = given.item or read_ids(args.items)
    tokenizer = load_checkpoint(BlossomRecTokenizer, args.model)
    item_ids, unknown = encode(tokenizer, texts)
    if unknown:
        raise ValueError(f"{args.items or 'The command line'} has {unknown}; remove them.")
    candidates = None
    if args.candidates is not None:
        candidates, unknown = encode(tokenizer, read_ids(args.candidates))
        if unknown:
            logger.warning(f"Dropped from {args.candidates}: {unknown}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model).to(device).eval()
    for start in range(0, len(item_ids), BATCH_SIZE):
        batch = item_ids[start : start + BATCH_SIZE]
        out = model.similar_items(batch, args.top_k, candidate_ids=candidates)
        found, scores = tokenizer.decode_items(out.item_ids), out.scores.tolist()
        for item, items, row in zip(tokenizer.decode_items(batch), found, scores):
            similar = [{"item": other, "score": score} for other, score in zip(items, row) if other is not None]
            print(json.dumps({"item": item, "similar": similar}, ensure_ascii=False))


if __name__ == "__main__":
    main()
