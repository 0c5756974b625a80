"""Cards and uploads of prepared data sets."""

from pathlib import Path

from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi

from ..data.filters import REPORT_FILE, FilterReport
from ..data.metadata import METADATA_FILE
from ..data.overview import describe_folder, summary
from ..data.storage import load_folder
from ..model.manifest_blossomrec import MANIFEST_NAME, TOKENIZER_NAMES, code_files
from .upload import ensure_repo


_COLUMNS = {
    "user_id": "the raw id of the user; one row per user, in the order of their first events in the log",
    "input_ids": "all events of the user in time order, as vocabulary ids: 0 is `[PAD]`, 1 `[UNK]`, items follow by frequency",
    "timestamps": "the time of each event, in seconds",
    "event_type_ids": "the type of each event",
    "weights": "the weight of each event in the loss; events of weight 0 are read and not predicted",
    "session_starts": "whether an event is the first of a session",
    "basket_starts": "whether an event is the first of a basket, whose events are predicted together",
    "train_end": "training reads `input_ids[:train_end]`",
    "validation_end": "the validation targets are `input_ids[train_end:validation_end]`",
    "test_end": "the test targets are `input_ids[validation_end:test_end]`",
    "part": "the part that the user belongs to: 0 train, 1 validation, 2 test",
}
_USAGE = """
## Use

```python
from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.data import split
{load}
test = split(dataset, "test")
```
"""
_LOAD_FOLDER = """from datasets import load_from_disk

dataset = load_from_disk("<this folder>")
tokenizer = BlossomRecTokenizer.from_pretrained("<this folder>")"""
_LOAD_REPOSITORY = """from datasets import load_dataset
from huggingface_hub import snapshot_download

dataset = load_dataset("{repo_id}", split="train")  # all users; the ends of the parts are columns
tokenizer = BlossomRecTokenizer.from_pretrained(snapshot_download("{repo_id}", repo_type="dataset"))"""


def dataset_card(folder: str | Path, repo_id: str | None = None) -> str:
    """
    The card of a prepared data set: counts, columns, source, license and filters, read from the files of `folder`.

    Args:
        folder: a folder that `blossomrec prepare` or `build_sequences` wrote.
        repo_id: the repository on the Hub that the card is for. Defaults to a card for the folder itself.

    Raises:
        ValueError: if `folder` is no prepared data set.
    """
    folder = Path(folder)
    dataset = load_folder(folder)
    filters = FilterReport.load(folder)
    lines = ["---", "tags:", "- sequential-recommendation", "- blossomrec", "license: other", "---", ""]
    lines += [f"# Item-id sequences from {filters.source if filters else 'a log'}", ""]
    lines += ["| | |", "|---|---|"] + [
        f"| {name} | {value} |" for name, value in summary(describe_folder(folder), filters)
    ]
    lines += ["", *_columns(dataset)]
    if filters:
        lines += ["", "## Source and license", "", f"Read from `{filters.source}`, format `{filters.format}`."]
        lines += [f"License of the source: {filters.license or 'not known; see the source.'}"]
        lines += ["", "## Filters", "", *(f"- {line}" for line in str(filters).splitlines())]
    load = _LOAD_FOLDER if repo_id is None else _LOAD_REPOSITORY.format(repo_id=repo_id)
    return "\n".join(lines) + "\n" + _USAGE.format(load=load)


def _columns(dataset: Dataset) -> list[str]:
    schema = dataset.features.arrow_schema
    rows = [f"| `{name}` | `{schema.field(name).type}` | {_COLUMNS.get(name, '')} |" for name in dataset.column_names]
    return ["## Columns", "", "| column | type | content |", "|---|---|---|", *rows]


def push_dataset(folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """
    Upload a prepared data set with its tokenizer, titles, filter report and card.

    Args:
        folder: a folder that `blossomrec prepare` or `build_sequences` wrote.
        repo_id: `owner/name` of a data set repository, created if it does not exist.
        private: whether to create a private repository. Defaults to `True`, because logs are personal data.
        token: the token to authenticate with. Defaults to the one of `hf auth login`, or `HF_TOKEN`.

    Returns:
        The URL of the last commit.

    Raises:
        ValueError, PermissionError, ConnectionError: as [`push`].
    """
    folder = Path(folder)
    dataset = load_folder(folder)
    repo_id = ensure_repo(repo_id, private=private, token=token, repo_type="dataset")
    dataset.push_to_hub(repo_id, private=private, token=token)
    # `Dataset.push_to_hub` wrote a card whose metadata lists the files of the rows. Keep these, replace the text.
    card, ours = DatasetCard.load(repo_id, token=token), DatasetCard(dataset_card(folder, repo_id))
    card.text = ours.text
    card.data.tags, card.data.license = ours.data.tags, ours.data.license
    card.push_to_hub(repo_id, token=token)
    url = HfApi(token=token).upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=[*TOKENIZER_NAMES, MANIFEST_NAME, *code_files(folder), METADATA_FILE, REPORT_FILE],
        commit_message="Tokenizer, titles and filter report",
    )
    return str(url)
