"""
Export a checkpoint for use outside Python (ONNX, extra `onnx`, or a `torch.export` program), or a prepared data set as one
file.

    blossomrec export --model runs/ml-1m --output ml-1m.onnx
    blossomrec export --model runs/ml-1m --output ml-1m.pt2
    blossomrec export --data data/ml-1m --output ml-1m.safetensors

An exported data set trains on machines without `polars` and `datasets`: `blossomrec train --data ml-1m.safetensors`. It
contains the events, the splits, the tokenizer and the item titles of a folder that `blossomrec prepare` wrote.

Exported models take `input_ids` and `attention_mask` (int64 `[batch, length]`, any batch size and length) and return `scores`
`[batch, vocab_size]` of the next item (−inf for [PAD] and [UNK]). Models of times or event types also take `timestamps` (seconds)
and `event_type_ids` (int64 `[batch, length]`), `prediction_time` ("now", −2^63 if it is unknown) and `target_event_type` (−1 if
it is unknown), int64 `[batch]`. With ONNX Runtime:

    onnxruntime.InferenceSession("ml-1m.onnx").run(["scores"], {"input_ids": ids, "attention_mask": mask})
"""

from io import BytesIO
from pathlib import Path

import torch

from .. import BlossomRecForSequentialRecommendation
from ..sharing.export import export_onnx, export_program
from ..utils.command_line import Parser, exit_on_error, load_checkpoint
from ..utils.files import atomic_files, require_folder
from ..utils.progress import set_up_logging


@exit_on_error()
def main() -> None:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Folder of a trained model, or a Hub id.")
    source.add_argument("--data", help="Folder that `blossomrec prepare` wrote.")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="Output file, ending in .onnx or .pt2; with --data, in .safetensors.",
    )
    args = parser.parse_args()
    set_up_logging()
    suffixes = (".safetensors",) if args.model is None else (".onnx", ".pt2")
    if args.output.suffix not in suffixes:
        parser.error(f"--output is {args.output}; it must end in {' or '.join(suffixes)}")
    if args.output.is_dir():
        parser.error(f"--output is {args.output}, which is a folder; give the name of a file")
    require_folder(args.output.parent)
    if args.data is not None:
        from ..data.storage import export_folder  # imports polars and datasets

        export_folder(args.data, args.output)
    else:
        export_model(args.model, args.output)
    print(f"Wrote {args.output}, {args.output.stat().st_size / 2**20:.1f} MiB")


def export_model(path: str, output: Path) -> None:
    """Export the checkpoint at `path` in the format that the suffix of `output` names."""
    model = load_checkpoint(BlossomRecForSequentialRecommendation, path)
    with atomic_files(output.parent) as folder:  # large ONNX weights are written to a second file
        if output.suffix == ".onnx":
            export_onnx(model, folder / output.name)
        else:
            program = BytesIO()  # if PyTorch writes the file itself, a full disk ends the process with SIGABRT
            torch.export.save(export_program(model), program)
            (folder / output.name).write_bytes(program.getbuffer())


if __name__ == "__main__":
    main()
