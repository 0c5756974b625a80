"""
Converts a checkpoint of the authors' code (BlossomRec in RecBole) into one of this package, or the other way.

    blossomrec convert --checkpoint saved/BlossomRec-Dec-01.pth --output_dir runs/converted --items items.txt
    blossomrec convert --model runs/converted --output_file BlossomRec.pth

The scores are the same, or the conversion is refused with a sentence. A model goes back if it has their sizes: 2 key/value
heads, 4 selected blocks and `blossomrec train --config_overrides '{"short_term_block_size": 1, "short_term_window": 8}'`. Nothing in
a `.pth` file is run.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from .. import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from ..data.parts import reading
from ..sharing.conversion import from_authors, to_authors
from ..sharing.recbole import read_checkpoint
from ..utils.command_line import HelpFormatter, exit_on_error, load_checkpoint
from ..utils.files import atomic_files, atomic_write, require_folder


@dataclass
class ConversionArguments:
    """From what into what."""

    checkpoint: str | None = field(
        default=None, metadata={"help": "A .pth file of RecBole, or of a state_dict, to convert into ours."}
    )
    output_dir: str = field(default="runs/converted", metadata={"help": "Where our model and tokenizer go."})
    items: str | None = field(
        default=None, metadata={"help": "Raw item ids, one a line, from RecBole's id 1 on; by default, those numbers."}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "Where the file does not tell; 8 there."})
    hidden_act: str | None = field(default=None, metadata={"help": "Where the file does not tell; gelu there."})
    model: str | None = field(
        default=None, metadata={"help": "Our model, a folder or a Hub id, to convert into theirs."}
    )
    output_file: str = field(default="BlossomRec.pth", metadata={"help": "Where their weights go."})

    def __post_init__(self):
        if (self.checkpoint is None) == (self.model is None):
            raise ValueError("Give either `checkpoint` (theirs, to ours) or `model` (ours, to theirs).")


@exit_on_error()
def main() -> None:
    parser = HfArgumentParser(ConversionArguments, description=__doc__, formatter_class=HelpFormatter)
    convert(*parser.parse_args_into_dataclasses())


def convert(args: ConversionArguments) -> None:
    if args.model is not None:
        with atomic_write(args.output_file) as partial:  # first, because it checks the folder
            model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model)
            torch.save({"state_dict": to_authors(model)}, partial)
        print(args.output_file)
        return
    require_folder(args.output_dir)
    state, settings = read_checkpoint(args.checkpoint)
    asked = {"num_attention_heads": args.num_attention_heads, "hidden_act": args.hidden_act}
    model = from_authors(state, **settings | {name: value for name, value in asked.items() if value is not None})
    num_items = model.config.num_items
    items: list[int] | list[str] = list(range(1, num_items + 1))
    if args.items is not None:
        with reading(args.items):
            items = Path(args.items).read_text("utf-8").splitlines()
        if len(items) != num_items:
            raise ValueError(f"`items` {args.items} has {len(items)} lines, the checkpoint {num_items} items.")
    tokenizer = BlossomRecTokenizer.from_items(items)
    with atomic_files(args.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(args.output_dir)


if __name__ == "__main__":
    main()
