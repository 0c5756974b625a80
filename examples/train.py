"""
Train a model under Accelerate: `blossomrec train` as a script.

    accelerate launch examples/train.py --help
"""

from blossomrec_hf.commands.train import main


if __name__ == "__main__":
    main()
