"""
Upload a trained model to the Hub: model, code, tokenizer, card, training summary, pictures, titles and item index.

    blossomrec push --folder runs/ml-1m --repo_id me/blossomrec-ml-1m --private
    blossomrec push --folder runs/ml-1m --repo_id them/blossomrec-ml-1m --create_pr

Everything is uploaded in one commit. After an interrupted upload, the same command continues.
"""

from dataclasses import asdict, dataclass, field

from transformers import HfArgumentParser

from ..sharing import push
from ..utils.command_line import HelpFormatter, exit_on_error


@dataclass
class PushArguments:
    """The folder and the repository. The token is the one of `hf auth login`, or HF_TOKEN."""

    folder: str = field(metadata={"help": "A folder that `blossomrec train`, `Trainer` or `save_pretrained` wrote."})
    repo_id: str = field(
        metadata={"help": "owner/name, or a name in your own namespace; created if it does not exist."}
    )
    private: bool = field(default=False, metadata={"help": "Create a private repository."})
    revision: str | None = field(
        default=None, metadata={"help": "The branch, created if it does not exist; by default, main."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    exist_ok: bool = field(default=True, metadata={"help": "Add a commit if the repository exists."})
    commit_message: str = field(default="Upload a BlossomRec model", metadata={"help": "The title of the commit."})


@exit_on_error()
def main() -> None:
    parser = HfArgumentParser(PushArguments, description=__doc__, formatter_class=HelpFormatter)
    (args,) = parser.parse_args_into_dataclasses()
    pushed = push(**asdict(args))
    print(pushed.pr_url or pushed.commit_url)


if __name__ == "__main__":
    main()
