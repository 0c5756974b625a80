"""
A web page for any BlossomRec checkpoint: choose or type a history, and see ten recommendations with their explanation.

    python examples/space/app.py                                    # a model of `blossomrec train`
    python examples/space/app.py --model you/your-model --data ratings.csv

As a Space on the Hub: see README.md in this folder.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
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
from blossomrec_hf.model.ids_blossomrec import NUM_SPECIAL_IDS, UNKNOWN_TYPE
from blossomrec_hf.utils.command_line import HelpFormatter


TOP_K, NUM_SAMPLES, NUM_MATCHES = 10, 6, 6
UNIT = "Number: the model's score (a logit). Bar: the chance it gives the item, beside that of the first."
# Gradio's default grays and orange have too little contrast.
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
    """A sample history of vocabulary ids, the next item of its user, if known, and the events' times in seconds, if known."""

    label: str
    history: list[int]
    next_item: int | None = None
    times: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Served:
    """A checkpoint with the titles of its items, by vocabulary id, and sample histories."""

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
        """A history as text, as a user types it."""
        return " ".join(self.tokenizer.convert_ids_to_tokens(history))

    def search(self, query: str) -> list[int]:
        """Items whose titles contain all words of `query`: those that contain the whole query first, then by frequency."""
        query = query.strip().casefold()
        titles = ((item, title.casefold()) for item, title in self.titles.items())
        found = [(query not in t, item) for item, t in titles if query and all(word in t for word in query.split())]
        return [item for _, item in sorted(found)[:NUM_MATCHES]]


def load(model_id: str, data: str | None = None, max_length: int = 2000) -> Served:
    """
    Load a checkpoint, its titles and sample histories.

    Args:
        model_id: a folder or a Hub id.
        data: a log to take sample histories from. Defaults to the built-in data set if the model was trained on it.

    Raises:
        ValueError: if the checkpoint or the log cannot be read; the message is one sentence.
    """
    try:
        model_type = PreTrainedConfig.get_config_dict(model_id)[0].get("model_type")
        if model_type is None:
            raise ValueError("it has no model. Has its training finished?")
        if model_type != "blossomrec":
            raise ValueError(f"its config.json belongs to {model_type!r}, not to a BlossomRec model.")
        model = BlossomRecForSequentialRecommendation.from_pretrained(model_id).eval()
        tokenizer = BlossomRecTokenizer.from_pretrained(model_id)
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} ids, its model {model.config.vocab_size}.")
    except Exception as error:  # a damaged file can make the libraries raise any error
        raise ValueError(
            f"Cannot load {model_id!r}, which must be a folder of `blossomrec train` or a Hub id (owner/name): "
            + (str(error).strip() or type(error).__name__).splitlines()[0]
        ) from error
    titles_file, titles = _find_file(model_id, METADATA_FILE), {}
    if titles_file is not None:
        frame = pl.read_parquet(titles_file, columns=["item", "title"]).drop_nulls()
        titles = dict(zip(tokenizer.encode_items(frame["item"].to_list()), frame["title"].to_list()))
        titles.pop(tokenizer.unk_token_id, None)
    served = Served(model_id, model, tokenizer, titles, [], max_length)
    served.samples.extend(_samples(served, data))
    return served


def _find_file(model_id: str, name: str) -> Path | None:
    """A file of the checkpoint, local or from the Hub; `None` if there is none."""
    path = Path(model_id) / name
    if not path.parent.is_dir():
        try:
            path = Path(hf_hub_download(model_id, name))
        except OSError:
            return None
    return path if path.is_file() else None


def _samples(served: Served, data: str | None) -> list[Sample]:
    counts, run = served.model.item_counts[NUM_SPECIAL_IDS:], _find_file(served.name, "run.yaml")
    popular = (counts.argsort(descending=True, stable=True)[:TOP_K] + NUM_SPECIAL_IDS).tolist()
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
        kept = [place for place, item in enumerate(row["input_ids"]) if item > 1]
        history, times = (
            [row[name][place] for place in kept] if name in row else [] for name in ("input_ids", "timestamps")
        )
        if len(history) > 1:
            label = f"User {row['user_id']}: {len(history) - 1:,} items"
            samples.append(Sample(label, history[:-1], history[-1], times[:-1]))
    return samples or [Sample("The most popular items", popular)]


def read_history(served: Served, text: str) -> tuple[list[int], list[str]]:
    """Convert typed text to vocabulary ids, with notices about parts that are ignored."""
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
        notices.append(
            f"Ignored, because these are no item ids: {_some(malformed)}. Item ids are integers, such as {example}."
        )
    if unknown:
        notices.append(f"Ignored, because the model has no such items: {_some(unknown)}.")
    if len(known) > served.max_length:
        notices.append(f"Only the latest {served.max_length:,} of these {len(known):,} items are used.")
    return known[-served.max_length :], notices


def _some(words: list[str]) -> str:
    more = f" and {len(words) - 10:,} more" if len(words) > 10 else ""
    return ", ".join(word if len(word) <= 40 else f"{word[:40]}…" for word in words[:10]) + more


def event_columns(served: Served, history: list[int]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    The times and types that the model reads of the events of a history, int64 `[1, events]` by column, with notices about what
    is not known. Times are those of the longest sample that the history begins with. Later events have the time of the last
    one, and without a sample, all have the latest time of the training data.
    """
    names, columns, notices = served.model.config.event_columns, {}, []
    if "timestamps" in names:
        begins = [s.times for s in served.samples if s.times and s.history == history[: len(s.history)]]
        times = max(begins, key=len, default=[])
        last = times[-1] if times else int(served.model.model.latest_time)
        columns["timestamps"] = torch.tensor([times + [last] * (len(history) - len(times))])
        if len(times) < len(history):
            notices.append(
                "The model reads the times of events. Those of typed items are not known: they have the time of the item before."
            )
    if "event_type_ids" in names:
        columns["event_type_ids"] = torch.full((1, len(history)), UNKNOWN_TYPE)
        notices.append("The model reads the types of events, which are unknown here.")
    return columns, notices if any(history) else []


def answer(served: Served, text: str | None, exclude_seen: bool | None = None) -> tuple[str, str]:
    """The HTML for a history: notices and recommendations, and their explanation."""
    history, notices = read_history(served, text or "")
    top_k = min(TOP_K, served.model.config.num_items)
    columns, missing = event_columns(served, history or [0])
    notices += missing
    best = served.model.recommend(torch.tensor([history or [0]]), top_k=top_k, exclude_seen=exclude_seen, **columns)
    items = [item for item in best.item_ids[0].tolist() if item >= 0]
    scores = best.scores[0, : len(items)]
    if history:
        heading, note, digits = "Recommended next", UNIT, 2
        bars = (scores - scores[:1]).exp()
    else:
        notices.append("The history has no items of this model.")
        heading, note, digits = "The most popular items", "Number: how often the item occurs in the training data.", 0
        bars = scores / scores[:1].clamp(min=1)
    rows = []
    for item, score, bar in zip(items, scores.tolist(), bars.tolist()):
        raw = f"id {served.tokenizer.decode_items(item)}" if item in served.titles else ""
        rows.append((served.label(item), raw, f"{score:,.{digits}f}", bar))
    next_item = next((sample.next_item for sample in served.samples if sample.history == history), None)
    if next_item is not None:
        place = f"number {items.index(next_item) + 1} here" if next_item in items else "not among these"
        note = f"What this user took next: {served.label(next_item)}, {place}. {note}"
    alerts = "".join(f'<p class="notice" role="alert">{escape(notice)}</p>' for notice in notices)
    if not history:
        why = '<section class="why"><h2>Why these</h2><p>Without a history there is nothing to explain.</p></section>'
    else:
        why = render_explanation(explain(served.model, history, **columns), [served.label(item) for item in history])
    return alerts + render_recommendations(heading, rows, note), why


def build_page(served: Served) -> gr.Blocks:
    """Build the page. Its style is in `style.css`."""
    with gr.Blocks(title="BlossomRec: what next, and why", analytics_enabled=False) as page:
        config = served.model.config
        gr.HTML(
            f"<h1>What next, and why</h1><p>{escape(served.name)}: {config.num_items:,} items, "
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

        event = {"fn": show, "inputs": [history, exclude_seen], "outputs": [best, why], "show_progress": "hidden"}
        with matches:

            @gr.render(query, [query.change], trigger_mode="always_last", show_progress="hidden")
            def show_matches(words: str) -> None:
                for item in served.search(words):
                    button = gr.Button(served.label(item), size="sm")
                    button.click(partial(add, item), history, history).then(**event)

        gr.on([page.load, run.click, history.submit, exclude_seen.input], **event)
        samples.click(lambda row: row[0], samples, history).then(**event)
        query.submit(add_first, [query, history], [query, history]).then(**event)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    model = os.environ.get("BLOSSOMREC_MODEL", "runs/blossomrec")
    parser.add_argument("--model", default=model, help="folder or Hub id of a checkpoint (or BLOSSOMREC_MODEL)")
    data = os.environ.get("BLOSSOMREC_DATA")
    parser.add_argument("--data", default=data, help="a log to take sample histories from (or BLOSSOMREC_DATA)")
    parser.add_argument("--max_length", type=int, default=2000, help="maximum number of latest items that are used")
    parser.add_argument("--port", type=int, help="port of the server; by default, the first free one from 7860")
    args = parser.parse_args()
    try:
        page = build_page(load(args.model, args.data, args.max_length))
    except ValueError as error:
        if "SPACE_ID" not in os.environ:
            sys.exit(str(error))
        with gr.Blocks(analytics_enabled=False) as page:  # the log of a Space is hidden from its visitors
            gr.HTML(f'<p role="alert">{escape(str(error))}</p>')
    style = Path(__file__).with_name("style.css")
    page.launch(server_port=args.port, css_paths=style, theme=THEME, footer_links=[], ssr_mode=False)


if __name__ == "__main__":
    main()
