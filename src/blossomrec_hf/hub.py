"""Cards, and what goes to the Hub with them."""

from pathlib import Path

from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi

from .data.filters import FilterReport
from .data.overview import describe, summary


_COLUMNS = {
    "user_id": "the raw id of the user; a row a user, in the order in which the log first shows them",
    "input_ids": "all events of the user in time order, as vocabulary ids: 0 is `[PAD]`, 1 `[UNK]`, items follow by frequency",
    "timestamps": "when each event was, in the log's unit",
    "train_end": "training reads `input_ids[:train_end]`",
    "validation_end": "validation asks for `input_ids[train_end:validation_end]`",
    "test_end": "the test asks for `input_ids[validation_end:test_end]`",
    "part": "whose the user is: 0 train, 1 validation, 2 test",
}


def dataset_card(folder: str | Path) -> str:
    """
    The card of a data set that `build_sequences` saved: columns, source, licence, filters and counts, all of it taken
    from the files of `folder`.
    """
    folder = Path(folder)
    dataset = Dataset.load_from_disk(str(folder))
    filters = FilterReport.load(folder)
    lines = ["---", "tags:", "- sequential-recommendation", "- blossomrec", "license: other", "---", ""]
    lines += [f"# Item-id sequences from {filters.source if filters else 'a log'}", ""]
    lines += ["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in summary(describe(dataset), filters)]
    lines += ["", "## Columns", "", "| column | type | what it is |", "|---|---|---|"]
    schema = dataset.features.arrow_schema
    lines += [
        f"| `{name}` | `{schema.field(name).type}` | {_COLUMNS.get(name, '')} |" for name in dataset.column_names
    ]
    if filters:
        lines += ["", "## Source and licence", "", f"Read from `{filters.source}`, format `{filters.format}`."]
        lines += [
            f"Licence of the source: {filters.licence or 'not known to the tool that built this; see the source.'}"
        ]
        lines += ["", "## Filters", "", *(f"- {line}" for line in str(filters).splitlines())]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from blossomrec_hf import BlossomRecTokenizer",
        "from blossomrec_hf.data import split",
    ]
    lines += ["from datasets import load_from_disk", "", 'dataset = load_from_disk("<this folder>")']
    lines += [
        'tokenizer = BlossomRecTokenizer.from_pretrained("<this folder>")',
        'test = split(dataset, "test")',
        "```",
        "",
    ]
    return "\n".join(lines)


def push_dataset(folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """
    Pushes a data set that `build_sequences` saved, with tokenizer, titles, filter report and card.

    Args:
        repo_id (`str`): `owner/name` of a data set repository; made if it is not there.
        private (`bool`): whether a new repository is private. Logs are people's behaviour: it is, unless asked.

    Returns:
        `str`: the address of the repository.
    """
    folder = Path(folder)
    dataset = Dataset.load_from_disk(str(folder))
    dataset.push_to_hub(repo_id, private=private, token=token)
    # `push_to_hub` writes a card that says where the rows are; its text becomes ours, its data stays.
    card = DatasetCard.load(repo_id, token=token)
    ours = DatasetCard(dataset_card(folder))
    card.text = ours.text
    card.data.tags, card.data.license = ours.data.tags, ours.data.license
    card.push_to_hub(repo_id, token=token)
    address = HfApi(token=token).upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=["tokenizer*", "tokenization_*.py", "item_metadata.parquet", "filters.json"],
        commit_message="Tokenizer, titles and filter report",
    )
    return str(address)
