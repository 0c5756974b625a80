"""
Write the model card of a run. All figures in it come from the files that the run wrote.

    blossomrec card --folder runs/ml-1m                                   # writes its README.md
    blossomrec card --results model_cards/blossomrec-ml-1m.json --dataset_name "MovieLens-1M" \\
        --published model_cards/published-ml-1m.json --output model_cards/blossomrec-ml-1m.md
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ..evaluation import read_results
from ..sharing.cards import model_card, write_card
from ..utils.command_line import HelpFormatter, exit_on_error
from ..utils.files import atomic_write, read_json


@dataclass
class CardArguments:
    """The runs and the file of the card."""

    folder: str | None = field(
        default=None,
        metadata={"help": "Folder of a run, in which README.md is written. Give either this or `results`."},
    )
    results: str | None = field(default=None, metadata={"help": "File that `blossomrec train --results_json` wrote."})
    output: str | None = field(default=None, metadata={"help": "File for the card, if `results` is given."})
    name: str | None = field(
        default=None, metadata={"help": "Name of the model; by default, the name of the folder or file."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of the data set; by default, the name of its file."}
    )
    published: str | None = field(
        default=None, metadata={"help": "JSON file of published figures to list for comparison; by default, none."}
    )
    license: str | None = field(
        default=None, metadata={"help": "License identifier of the Hub, such as apache-2.0; by default, none."}
    )

    def __post_init__(self):
        if (self.folder is None) == (self.results is None):
            raise ValueError("Give either `folder` or `results`.")
        if self.results is not None and self.output is None:
            raise ValueError("`results` requires `output`; give the file of the card.")


@exit_on_error()
def main() -> None:
    parser = HfArgumentParser(CardArguments, description=__doc__, formatter_class=HelpFormatter)
    (args,) = parser.parse_args_into_dataclasses()
    options = {"dataset_name": args.dataset_name, "license": args.license}
    if args.published is not None:
        options["published"] = read_json(args.published, list)
    if args.folder is not None:
        path = write_card(args.folder, name=args.name, **options)
    else:
        path = Path(args.output)
        card = model_card(read_results(args.results), name=args.name or Path(args.results).stem, **options)
        with atomic_write(path) as partial:
            partial.write_text(str(card), "utf-8")
    print(path)


if __name__ == "__main__":
    main()
