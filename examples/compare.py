"""
Compares models by the ranks that examples/evaluate.py wrote: the means over the models (seeds) of one kind beside those
of another, each ± their standard deviation, and the difference with its standard error, by a bootstrap over users who are
the same on both sides.

    python examples/evaluate.py --models runs/blossom-1 runs/blossom-2 --max_length 1000 --output_dir reports/blossom ...
    python examples/evaluate.py --models runs/full-1 runs/full-2 --max_length 200 --output_dir reports/full ...
    python examples/compare.py --reports reports/blossom reports/full --first "runs/blossom-*" --second "runs/full-*"
"""

import argparse
import fnmatch
import re
from pathlib import Path

import numpy as np

from blossomrec_hf.command_line import HelpFormatter, exit_on_error
from blossomrec_hf.training import paired_difference, per_user_metrics


def read_ranks(folders: list[str]) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """The ranks of all users' items, by suffix and name of the model, and the user of each item."""
    files = []
    for folder in folders:
        path = Path(folder) / "ranks.npz"
        if not path.is_file():
            raise ValueError(f"`reports`: {folder} has no ranks.npz; examples/evaluate.py writes it.")
        with np.load(path) as file:
            files.append({name: file[name] for name in file.files})
        if not all(np.array_equal(files[0][name], files[-1][name]) for name in ("users", "user_ids")):
            raise ValueError(f"`reports`: {folder} is of other users than {folders[0]}; they cannot be paired.")
    ranks: dict[str, dict[str, np.ndarray]] = {}
    for folder, file in zip(folders, files):
        for name in file.keys() - {"users", "user_ids"}:
            model, suffix = re.fullmatch(r"(.*?)(_unseen|_uni\d+|)", name).groups()
            model, suffix = (model, suffix) if model in file else (name, "")  # a folder may be called so
            known = ranks.setdefault(suffix, {})
            if model in known and not np.array_equal(known[model], file[name]):
                raise ValueError(f"`reports`: {folder} has other ranks of {model} than a report before it.")
            known[model] = file[name]
    return dict(sorted(ranks.items())), files[0]["users"]


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--reports", nargs="+", required=True, help="folders that evaluate.py wrote")
    parser.add_argument("--first", required=True, help="models of one kind: names as in --models, with * and ?")
    parser.add_argument("--second", required=True, help="those of the other kind")
    parser.add_argument("--k", type=int, default=10, help="the cut-off")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap samples")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    args = parser.parse_args()
    ranks, users = read_ranks(args.reports)
    models = {side: fnmatch.filter(ranks[""], getattr(args, side)) for side in ("first", "second")}
    for side, names in models.items():
        if not names:
            parser.error(f"--{side} is {getattr(args, side)}; the reports are of {', '.join(ranks[''])}")
        print(f"{side}: {', '.join(names)}")
    print("\n| | first | second | difference ± its standard error |\n|---|---|---|---|")
    for suffix, by_model in ranks.items():
        if not by_model.keys() >= {*models["first"], *models["second"]}:
            continue  # drawn items of some alone
        for name in (f"recall@{args.k}", f"ndcg@{args.k}"):
            sides = [
                np.stack([per_user_metrics(by_model[model], ks=[args.k], users=users)[name] for model in names])
                for names in models.values()
            ]
            means = [values.mean(1) for values in sides]  # of each model
            spread = [f" ± {np.std(mean, ddof=1):.4f}" if len(mean) > 1 else "" for mean in means]
            better, error = paired_difference(*sides, samples=args.samples, seed=args.seed)
            cells = [f"{mean.mean():.4f}{more}" for mean, more in zip(means, spread)]
            print(f"| {name}{suffix} | {' | '.join(cells)} | {better:+.4f} ± {error:.4f} |")


if __name__ == "__main__":
    main()
