"""
Writes a checkpoint for use outside of Python: ONNX (extra `onnx`), or a program of `torch.export`.

    blossomrec export --model runs/ml-1m --output ml-1m.onnx
    blossomrec export --model runs/ml-1m --output ml-1m.pt2

Both take `input_ids` and `attention_mask` `[batch, length]` int64 of any batch and length and give `scores` `[batch,
vocab_size]` of the next item (−inf for [PAD] and [UNK]); with ONNX Runtime:

    onnxruntime.InferenceSession("ml-1m.onnx").run(["scores"], {"input_ids": ids, "attention_mask": mask})
"""

import argparse
from io import BytesIO
from pathlib import Path

import torch

from .. import BlossomRecForSequentialRecommendation
from ..sharing.export import export_onnx, export_program
from ..utils.command_line import HelpFormatter, exit_on_error, load_checkpoint
from ..utils.files import atomic_files, require_folder


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model, or a Hub id")
    parser.add_argument("--output", type=Path, required=True, help="a file that ends in .onnx or .pt2")
    args = parser.parse_args()
    if args.output.suffix not in (".onnx", ".pt2"):
        parser.error(f"--output is {args.output}; it must end in .onnx or .pt2")
    if args.output.is_dir():
        parser.error(f"--output is {args.output}, which is a folder; give the name of a file")
    require_folder(args.output.parent)
    model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model)
    with atomic_files(args.output.parent) as folder:  # large ONNX weights are a file of their own
        if args.output.suffix == ".onnx":
            export_onnx(model, folder / args.output.name)
        else:
            program = (
                BytesIO()
            )  # where PyTorch writes this to a file itself, a full disk ends the process with SIGABRT
            torch.export.save(export_program(model), program)
            (folder / args.output.name).write_bytes(program.getbuffer())
    print(f"Wrote {args.output}, {args.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
