"""
Draw the mechanism for one query of a small random model, as in the README. Blocks and masks come from the model itself.

    python examples/mechanism.py [FILE]     # by default, examples/mechanism.png
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import set_seed

from blossomrec_hf import BlossomRecConfig, BlossomRecModel
from blossomrec_hf.model.ops_reference import Queries, selected_mask, short_mask


LENGTH, SELECTED = 70, 2
LONG, PALE, SHORT, GRAY = "#2b6cb0", "#90cdf4", "#c05621", "#e2e8f0"

set_seed(7)
config = BlossomRecConfig(
    vocab_size=1000,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    compress_block_size=8,
    compress_stride=4,
    selection_block_size=8,
    num_selected_blocks=LENGTH // 8,  # all candidates, in the order of their importance
    short_term_block_size=4,
    initializer_range=0.2,
)
with torch.no_grad():
    history = torch.randint(2, 1000, (1, LENGTH))
    layer = BlossomRecModel(config).eval()(history, output_selection=True).selections[0]
blocks, importance = layer.block_indices[0, -1, 0], layer.importance[0, -1, 0]
query = Queries(torch.tensor([0]), torch.tensor([LENGTH - 1]), LENGTH, 1)
position = torch.arange(LENGTH)
long_term = selected_mask(blocks[None, None, :SELECTED], query, position, block_size=8)[0, 0]
short_term = short_mask(query, position, block_size=4, window=config.short_term_window, base=config.power_law_base)[
    0, 0
]

figure = Figure(figsize=(11, 4.2), layout="constrained")
panel = figure.subplots()


def draw_items(y: float, colors: list[str]) -> None:
    for place, color in enumerate(colors):
        panel.add_patch(Rectangle((place + 0.08, y), 0.84, 0.8, color=color))


def label(y: float, text: str) -> None:
    panel.text(-1, y + 0.4, text, ha="right", va="center", fontsize=9)


def note(y: float, text: str, color: str) -> None:
    panel.text(LENGTH + 0.6, y + 0.4, text, va="center", fontsize=9, color=color)


label(7.6, "history of one user,\noldest item first")
draw_items(7.6, [GRAY] * (LENGTH - 1) + ["black"])
note(7.6, "query", "black")

label(6, "split and compress: every window of\nl items, s apart, becomes one key")
for window in range(LENGTH // config.compress_stride):
    end = (window + 1) * config.compress_stride
    start, y = max(0, end - config.compress_block_size), 6.1 + 0.6 * (window % 2)
    panel.plot([start + 0.3, end - 0.3], [y, y], color=LONG, linewidth=1.5)
    panel.plot(end - 0.5, y, "o", color=LONG, markersize=3.5)

label(4.4, "score: importance of every past\nblock of b items, for this query")
for block, height in zip(blocks.tolist(), (importance / importance.max()).tolist()):
    color = LONG if block in blocks[:SELECTED] else PALE
    panel.add_patch(Rectangle((8 * block + 0.3, 4.2), 7.4, 1.1 * height, color=color))

label(2.8, "select and attend: the best blocks\nand the own one, item by item")
draw_items(2.8, [LONG if seen else GRAY for seen in long_term.tolist()])
note(2.8, "× long-term gate", LONG)

label(1.4, "short-term: blocks of B items at\ndistances 0, 1, 2, 4, 8 …")
draw_items(1.4, [SHORT if seen else GRAY for seen in short_term.tolist()])
note(1.4, "× short-term gate", SHORT)
note(0.4, "the sum is the output of the head", "black")

panel.set(xlim=(-24, LENGTH + 18), ylim=(0.4, 8.5))
panel.axis("off")
figure.savefig(
    sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None}
)
