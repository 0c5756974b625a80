"""
Run a paired significance test between two groups of checkpoints, such as several seeds of two configurations.

Reads the ranks that `blossomrec evaluate` wrote. Prints the mean and the standard deviation of each group, and the difference
with its standard error from a bootstrap over users. Both groups must have been evaluated on the same users.

    blossomrec evaluate --models runs/blossom-1 runs/blossom-2 --max_length 1000 --output_dir reports/blossom ...
    blossomrec evaluate --models runs/full-1 runs/full-2 --max_length 200 --output_dir reports/full ...
    blossomrec compare --reports reports/blossom reports/full --first "runs/blossom-*" --second "runs/full-*"
    blossomrec compare --reports reports/times --first "runs/times-*, with now" --second "runs/times-*"
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..evaluation import paired_difference, per_user_metrics
from ..evaluation.reports import NOW_LABEL
from ..utils.command_line import Parser, check_at_least, exit_on_error


COMMON = ("users", "user_ids", "repeated", "exclude_seen")  # equal in all reports of a comparison


def read_ranks(folders: list[str]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Read the ranks of all held-out items by metric suffix and model, and the arrays that all reports share."""
    files = []
    for folder in folders:
        path = Path(folder) / "ranks.npz"
        if not path.is_file():
            raise ValueError(f"`reports`: {folder} has no ranks.npz; run blossomrec evaluate with it as `output_dir`.")
        try:
            with np.load(path) as file:
                files.append({name: file[name] for name in file.files})
        except Exception as error:  # a damaged file raises errors of many types
            raise ValueError(f"`reports`: {path} is damaged ({error}); run blossomrec evaluate again.") from error
        if missing := set(COMMON) - files[-1].keys():
            raise ValueError(f"`reports`: {path} lacks {', '.join(sorted(missing))}; run blossomrec evaluate again.")
        if not all(np.array_equal(files[0][name], files[-1][name]) for name in COMMON[:3]):
            raise ValueError(f"`reports`: {folder} has other users than {folders[0]}; evaluate both on the same data.")
        if files[0]["exclude_seen"] != files[-1]["exclude_seen"]:
            raise ValueError(
                f"`reports`: only one of {folder} and {folders[0]} excludes seen items; run blossomrec evaluate with the same "
                "--exclude_seen."
            )
    ranks: dict[str, dict[str, np.ndarray]] = {}
    for folder, file in zip(folders, files):
        for name in file.keys() - set(COMMON):
            model, suffix = re.fullmatch(r"(.*?)(_all|_unseen|_uni\d+|_given\d+|)", name).groups()
            model, suffix = (model, suffix) if model in file else (name, "")  # a folder may have such a name
            known = ranks.setdefault(suffix, {})
            if model in known and not np.array_equal(known[model], file[name]):
                raise ValueError(
                    f"`reports`: {folder} has other ranks of {model} than an earlier report; give only one of them."
                )
            known[model] = file[name]
    return dict(sorted(ranks.items())), {name: files[0][name] for name in COMMON}


def choose_models(names: Iterable[str], pattern: str) -> list[str]:
    """The names that match a pattern. A model with now is another one, which only patterns with its ending match."""
    with_now = pattern.endswith(NOW_LABEL)
    return fnmatch.filter([name for name in names if name.endswith(NOW_LABEL) == with_now], pattern)


@exit_on_error()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--reports", nargs="+", required=True, help="Folders that `blossomrec evaluate` wrote.")
    parser.add_argument(
        "--first", required=True, help="Models of the first group: names as in --models, with * and ?."
    )
    parser.add_argument("--second", required=True, help="Models of the second group.")
    parser.add_argument("--k", type=int, default=10, help="Cut-off of the metrics.")
    parser.add_argument("--samples", type=int, default=1000, help="Number of bootstrap samples.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the bootstrap.")
    args = parser.parse_args()
    check_at_least(1, k=args.k, samples=args.samples)
    ranks, common = read_ranks(args.reports)
    models = {side: choose_models(ranks[""], getattr(args, side)) for side in ("first", "second")}
    for side, names in models.items():
        if not names:
            parser.error(f"--{side} is {getattr(args, side)}; the reports have {', '.join(ranks[''])}")
        print(f"{side}: {', '.join(names)}")
    print("\n| | first | second | difference ± its standard error |\n|---|---|---|---|")
    kinds = [(suffix, suffix, slice(None)) for suffix in ranks]
    if not common["exclude_seen"]:
        kinds += [("", "_repeated", common["repeated"]), ("", "_new", ~common["repeated"])]
    for suffix, shown, targets in kinds:
        by_model, (_, users) = ranks[suffix], np.unique(common["users"][targets], return_inverse=True)
        if len(users) == 0 or not by_model.keys() >= {*models["first"], *models["second"]}:
            continue  # no such target, or not reported for all models
        for name in (f"recall@{args.k}", f"ndcg@{args.k}"):
            sides = [
                np.stack(
                    [per_user_metrics(by_model[model][targets], ks=[args.k], users=users)[name] for model in names]
                )
                for names in models.values()
            ]
            means = [values.mean(1) for values in sides]  # one per model
            spread = [f" ± {np.std(mean, ddof=1):.4f}" if len(mean) > 1 else "" for mean in means]
            better, error = paired_difference(*sides, samples=args.samples, seed=args.seed)
            cells = [f"{mean.mean():.4f}{more}" for mean, more in zip(means, spread)]
            print(f"| {name}{shown} | {' | '.join(cells)} | {better:+.4f} ± {error:.4f} |")


if __name__ == "__main__":
    main()
