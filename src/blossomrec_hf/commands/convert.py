"""
Convert a checkpoint of the authors' code (BlossomRec in RecBole) to this package, or back.

    blossomrec convert --checkpoint saved/BlossomRec-Dec-01.pth --output_dir runs/converted --items items.txt
    blossomrec convert --model runs/converted --output_file BlossomRec.pth

The converted model gives the same scores; a checkpoint for which this is not possible is refused. A model can be converted
back if it has the authors' sizes: 2 key/value heads, 4 selected blocks, and `blossomrec train --config_overrides
'{"short_term_block_size": 1, "short_term_window": 8}'`. No code in a `.pth` file is executed.
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
from ..utils.progress import set_up_logging


@dataclass
class ConversionArguments:
    """The source and the target of a conversion."""

    checkpoint: str | None = field(
        default=None,
        metadata={"help": "The authors' checkpoint to convert: a .pth file of RecBole or of a state_dict."},
    )
    output_dir: str = field(
        default="runs/converted", metadata={"help": "Folder for the converted model and its tokenizer."}
    )
    items: str | None = field(
        default=None,
        metadata={
            "help": "File of raw item ids, one per line, starting at RecBole's id 1; by default, the numbers 1, 2, ..."
        },
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={"help": "Number of query heads, if the file does not state it; 8 in the authors' code."},
    )
    hidden_act: str | None = field(
        default=None, metadata={"help": "Activation, if the file does not state it; gelu in the authors' code."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Model of this package to convert back: a folder or a Hub id."}
    )
    output_file: str = field(default="BlossomRec.pth", metadata={"help": "File for the authors' weights."})

    def __post_init__(self):
        if (self.checkpoint is None) == (self.model is None):
            raise ValueError(
                "Give either `checkpoint`, to convert the authors' checkpoint, or `model`, to convert a model back."
            )


@exit_on_error()
def main() -> None:
    parser = HfArgumentParser(ConversionArguments, description=__doc__, formatter_class=HelpFormatter)
    (args,) = parser.parse_args_into_dataclasses()
    set_up_logging()
    convert(args)


def convert(args: ConversionArguments) -> None:
    if args.model is not None:
        with atomic_write(args.output_file) as partial:  # first, because it checks the folder
            model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model)
            torch.save({"state_dict": to_authors(model)}, partial)
        print(args.output_file)
        return
    require_folder(args.output_dir)
    state, settings = read_checkpoint(args.checkpoint)
    given = {"num_attention_heads": args.num_attention_heads, "hidden_act": args.hidden_act}
    model = from_authors(state, **settings | {name: value for name, value in given.items() if value is not None})
    num_items = model.config.num_items
    items: list[int] | list[str] = list(range(1, num_items + 1))
    if args.items is not None:
        with reading(args.items):
            items = Path(args.items).read_text("utf-8").splitlines()
        if len(items) != num_items:
            raise ValueError(
                f"`items` {args.items} has {len(items)} lines, but the checkpoint has {num_items} items; give one line per item."
            )
    tokenizer = BlossomRecTokenizer.from_items(items)
    with atomic_files(args.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(args.output_dir)


if __name__ == "__main__":
    main()
