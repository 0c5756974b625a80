"""
Uploads a trained model to the Hub: model, code, tokenizer, card, summary of the training, pictures, titles, index.

    blossomrec push --folder runs/ml-1m --repo_id me/blossomrec-ml-1m --private
    blossomrec push --folder runs/ml-1m --repo_id them/blossomrec-ml-1m --create_pr

All of it is one commit: it is there as a whole or not at all. What arrived of a push that broke off is not sent again.
"""

from dataclasses import asdict, dataclass, field

from transformers import HfArgumentParser

from ..sharing.hub import push_run
from ..utils.command_line import HelpFormatter, exit_on_error


@dataclass
class PushArguments:
    """What to push, and where to. The token is that of `hf auth login`, or HF_TOKEN."""

    folder: str = field(metadata={"help": "What `blossomrec train`, or Trainer, left."})
    repo_id: str = field(metadata={"help": "owner/name, or a name of your own; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "A new repository is private."})
    revision: str | None = field(
        default=None, metadata={"help": "The branch, made if it is not there; by default, main."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    exist_ok: bool = field(default=True, metadata={"help": "Add a commit to a repository that is there already."})
    commit_message: str = field(default="Upload a BlossomRec model", metadata={"help": "The title of the commit."})


@exit_on_error()
def main() -> None:
    parser = HfArgumentParser(PushArguments, description=__doc__, formatter_class=HelpFormatter)
    (args,) = parser.parse_args_into_dataclasses()
    pushed = push_run(**asdict(args))
    print(pushed.pr_url or pushed.commit_url)


if __name__ == "__main__":
    main()
