"""
A page for any BlossomRec checkpoint: pick a history or type one, see ten recommendations, and see why.

    python examples/space/app.py                                    # what examples/train.py saved
    python examples/space/app.py --model you/your-model --data ratings.csv

As a Space on the Hub: see README.md in this folder.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
import polars as pl
import torch
import yaml
from explain import explain, render_explanation, render_recommendations
from huggingface_hub import hf_hub_download
from transformers import PreTrainedConfig

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data import build_sequences, generate_log
from blossomrec_hf.data.metadata import METADATA_FILE
from blossomrec_hf.utils.command_line import HelpFormatter


TOP_K, NUM_SAMPLES, NUM_MATCHES = 10, 6, 6
UNIT = "Number: the model's score (a logit). Bar: the chance it gives the item, beside that of the first."
# Gradio's own greys and orange are too pale to read.
THEME = gr.themes.Default(primary_hue="indigo", neutral_hue="slate").set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)


@dataclass(frozen=True)
class Sample:
    """A history to try: vocabulary ids, and what its user took next, where that is known."""

    label: str
    history: list[int]
    next_item: int | None = None


@dataclass(frozen=True)
class Served:
    """A checkpoint and what is known beside it; `titles` by vocabulary id."""

    name: str
    model: BlossomRecForSequentialRecommendation
    tokenizer: BlossomRecTokenizer
    titles: dict[int, str]
    samples: list[Sample]
    max_length: int = 2000

    def label(self, item: int) -> str:
        """The title of a vocabulary id, or its raw id."""
        return self.titles.get(item) or f"item {self.tokenizer.decode_items(item)}"

    def text(self, history: list[int]) -> str:
        """A history as one types it."""
        return " ".join(self.tokenizer.convert_ids_to_tokens(history))

    def search(self, query: str) -> list[int]:
        """Items whose title holds all words of `query`: those that hold it as it stands first, then the more frequent."""
        query = query.strip().casefold()
        titles = ((item, title.casefold()) for item, title in self.titles.items())
        found = [(query not in t, item) for item, t in titles if query and all(word in t for word in query.split())]
        return [item for _, item in sorted(found)[:NUM_MATCHES]]


def load(model_id: str, data: str | None = None, max_length: int = 2000) -> Served:
    """
    Loads a checkpoint, its titles and histories to try.

    Args:
        model_id: a folder or a Hub id.
        data: a log to take sample histories from; by default, the built-in one if the model was trained on that.

    Raises:
        ValueError: with a sentence that tells what is wrong with either.
    """
    try:
        model_type = PreTrainedConfig.get_config_dict(model_id)[0].get("model_type")
        if model_type is None:
            raise ValueError("there is no model in it. Has its training finished?")
        if model_type != "blossomrec":
            raise ValueError(f"its config.json is that of {model_type!r}, not of a BlossomRec model.")
        model = BlossomRecForSequentialRecommendation.from_pretrained(model_id).eval()
        tokenizer = BlossomRecTokenizer.from_pretrained(model_id)
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} entries, its model {model.config.vocab_size}.")
    except Exception as error:  # whatever a broken file makes the libraries raise: here it is told in words
        raise ValueError(
            f"Cannot load {model_id!r}, which should be a folder that examples/train.py saved or a Hub id (owner/name): "
            + (str(error).strip() or type(error).__name__).splitlines()[0]
        ) from error
    titles_file, titles = _beside(model_id, METADATA_FILE), {}
    if titles_file is not None:
        frame = pl.read_parquet(titles_file, columns=["item", "title"]).drop_nulls()
        titles = dict(zip(tokenizer.encode_items(frame["item"].to_list()), frame["title"].to_list()))
        titles.pop(tokenizer.unk_token_id, None)
    served = Served(model_id, model, tokenizer, titles, [], max_length)
    served.samples.extend(_samples(served, data))
    return served


def _beside(model_id: str, name: str) -> Path | None:
    """A file of the checkpoint, here or on the Hub; `None` where it has none."""
    path = Path(model_id) / name
    if not path.parent.is_dir():
        try:
            path = Path(hf_hub_download(model_id, name))
        except OSError:
            return None
    return path if path.is_file() else None


def _samples(served: Served, data: str | None) -> list[Sample]:
    counts, run = served.model.item_counts[2:], _beside(served.name, "run.yaml")
    popular = (counts.argsort(descending=True, stable=True)[:TOP_K] + 2).tolist()
    source = data
    if data is None and run is not None and (yaml.safe_load(run.read_text("utf-8")) or {}).get("data", "") is None:
        source = generate_log()
    if source is None:
        return [Sample("The most popular items", popular)]
    try:
        dataset, _ = build_sequences(source, tokenizer=served.tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read histories from {data!r}: {error}") from error
    samples = []
    for row in dataset.select(sorted({len(dataset) * part // NUM_SAMPLES for part in range(NUM_SAMPLES)})):
        history = [item for item in row["input_ids"] if item > 1]
        if len(history) > 1:
            samples.append(Sample(f"User {row['user_id']}: {len(history) - 1:,} items", history[:-1], history[-1]))
    return samples or [Sample("The most popular items", popular)]


def read_history(served: Served, text: str) -> tuple[list[int], list[str]]:
    """What someone typed as vocabulary ids, and what to tell them about it."""
    numbers = served.tokenizer.item_type == "int"
    words = [word for word in re.split(r"[\s,;\[\]]+" if numbers else r"\s+", text) if word]
    known, unknown, malformed = [], [], []
    for word in words:
        if numbers and not re.fullmatch(r"-?[0-9]{1,18}", word):
            malformed.append(word)
        elif (item := served.tokenizer.convert_tokens_to_ids(str(int(word)) if numbers else word)) > 1:
            known.append(item)
        else:
            unknown.append(word)
    notices = []
    if malformed:
        example = served.text([2, 3])
        notices.append(f"No item ids, so left out: {_some(malformed)}. Ids here are whole numbers, such as {example}.")
    if unknown:
        notices.append(f"Unknown to this model, so left out: {_some(unknown)}.")
    if len(known) > served.max_length:
        notices.append(f"Only the latest {served.max_length:,} of these {len(known):,} items are read.")
    return known[-served.max_length :], notices


def _some(words: list[str]) -> str:
    more = f" and {len(words) - 10:,} more" if len(words) > 10 else ""
    return ", ".join(word if len(word) <= 40 else f"{word[:40]}…" for word in words[:10]) + more


def answer(served: Served, text: str | None, exclude_seen: bool | None = None) -> tuple[str, str]:
    """The page's answer to a history, as HTML: notices and recommendations, and what they rest on."""
    history, notices = read_history(served, text or "")
    top_k = min(TOP_K, served.model.config.vocab_size - 2)
    best = served.model.recommend(torch.tensor([history or [0]]), top_k=top_k, exclude_seen=exclude_seen)
    items = [item for item in best.item_ids[0].tolist() if item >= 0]
    scores = best.scores[0, : len(items)]
    if history:
        heading, note, digits = "Recommended next", UNIT, 2
        bars = (scores - scores[:1]).exp()
    else:
        notices.append("The history holds no item that this model knows.")
        heading, note, digits = "The most popular items", "Number: how often the training data hold the item.", 0
        bars = scores / scores[:1].clamp(min=1)
    rows = []
    for item, score, bar in zip(items, scores.tolist(), bars.tolist()):
        raw = f"id {served.tokenizer.decode_items(item)}" if item in served.titles else ""
        rows.append((served.label(item), raw, f"{score:,.{digits}f}", bar))
    next_item = next((sample.next_item for sample in served.samples if sample.history == history), None)
    if next_item is not None:
        place = f"number {items.index(next_item) + 1} here" if next_item in items else "not among these"
        note = f"What this user took next: {served.label(next_item)}, {place}. {note}"
    told = "".join(f'<p class="notice" role="alert">{escape(notice)}</p>' for notice in notices)
    if not history:
        why = '<section class="why"><h2>Why these</h2><p>Without a history there is nothing to explain.</p></section>'
    else:
        why = render_explanation(explain(served.model, history), [served.label(item) for item in history])
    return told + render_recommendations(heading, rows, note), why


def build_page(served: Served) -> gr.Blocks:
    """The page; its own style is `style.css`."""
    with gr.Blocks(title="BlossomRec: what next, and why", analytics_enabled=False) as page:
        config = served.model.config
        gr.HTML(
            f"<h1>What next, and why</h1><p>{escape(served.name)}: {config.vocab_size - 2:,} items, "
            f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads.</p>"
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                samples = gr.Dataset(
                    components=["textbox"],
                    samples=[[served.text(sample.history)] for sample in served.samples],
                    sample_labels=[sample.label for sample in served.samples],
                    label="Histories to try",
                )
                query = gr.Textbox(
                    label="Add an item by its title", info="Enter adds the first match.", visible=bool(served.titles)
                )
                matches = gr.Column(elem_id="matches")
                history = gr.Textbox(
                    served.text(served.samples[0].history),
                    label="The history, oldest first",
                    info="Item ids with spaces between them. Enter runs.",
                    max_lines=6,
                    elem_id="history",
                )
                exclude_seen = gr.Checkbox(
                    served.model.config.exclude_seen, label="Leave out what is in the history already"
                )
                run = gr.Button("Recommend", variant="primary", elem_id="run")
                best = gr.HTML(elem_id="best", elem_classes="answer", apply_default_css=False)
            with gr.Column(scale=3, min_width=320):
                why = gr.HTML(elem_id="why", elem_classes="answer", apply_default_css=False)

        def show(text: str, unseen: bool) -> tuple[str, str]:
            return answer(served, text, unseen)

        def add(item: int, text: str) -> str:
            return f"{text} {served.text([item])}".strip()

        def add_first(words: str, text: str) -> tuple[str, str]:
            found = served.search(words)
            return ("", add(found[0], text)) if found else (words, text)

        asked = {"fn": show, "inputs": [history, exclude_seen], "outputs": [best, why], "show_progress": "hidden"}
        with matches:

            @gr.render(query, [query.change], trigger_mode="always_last", show_progress="hidden")
            def show_matches(words: str) -> None:
                for item in served.search(words):
                    button = gr.Button(served.label(item), size="sm")
                    button.click(partial(add, item), history, history).then(**asked)

        gr.on([page.load, run.click, history.submit, exclude_seen.input], **asked)
        samples.click(lambda row: row[0], samples, history).then(**asked)
        query.submit(add_first, [query, history], [query, history]).then(**asked)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    model = os.environ.get("BLOSSOMREC_MODEL", "runs/blossomrec")
    parser.add_argument("--model", default=model, help="a checkpoint's folder or Hub id (or BLOSSOMREC_MODEL)")
    data = os.environ.get("BLOSSOMREC_DATA")
    parser.add_argument("--data", default=data, help="a log to take histories to try from (or BLOSSOMREC_DATA)")
    parser.add_argument("--max_length", type=int, default=2000, help="the latest items of a history that are read")
    parser.add_argument("--port", type=int, help="left out, the first free one from 7860 on")
    args = parser.parse_args()
    try:
        page = build_page(load(args.model, args.data, args.max_length))
    except ValueError as error:
        if "SPACE_ID" not in os.environ:
            sys.exit(str(error))
        with gr.Blocks(analytics_enabled=False) as page:  # nobody reads the log of a Space
            gr.HTML(f'<p role="alert">{escape(str(error))}</p>')
    style = Path(__file__).with_name("style.css")
    page.launch(server_port=args.port, css_paths=style, theme=THEME, footer_links=[], ssr_mode=False)


if __name__ == "__main__":
    main()
