"""What a model has to beat: the most popular items, and the items that follow the last one."""

import numpy as np
import torch

from .evaluation import HeldOutItems
from .histories import NUM_SPECIAL_TOKENS, HistoryStore, to_device


class PopularityScores:
    """
    The same scores for every user: how often each item occurs in training.

    Args:
        item_counts: int [vocabulary].
    """

    def __init__(self, item_counts: np.ndarray | torch.Tensor, *, device: torch.device | str = "cpu"):
        self.counts = torch.as_tensor(item_counts).to(device=device, dtype=torch.float32)

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        return self.counts.expand(len(users), -1)


class LastItemNeighbours:
    """
    How often training saw an item right after the user's last one (a first-order Markov chain); popularity, which
    never outweighs one such pair, decides between equals and serves users without a known last item.

    Args:
        training: the training histories, uncut.
        held_out: whose users are scored.
        item_counts: int [vocabulary], how often each item occurs in training.
    """

    def __init__(
        self,
        training: HistoryStore,
        held_out: HeldOutItems,
        item_counts: np.ndarray | torch.Tensor,
        *,
        device: torch.device | str = "cpu",
    ):
        self.popularity = PopularityScores(item_counts, device=device).counts
        self.popularity = self.popularity / (self.popularity.max() + 1)
        vocab_size = len(self.popularity)
        items = training.items.cpu().numpy().astype(np.int64)
        follows = np.ones(len(items), dtype=bool)
        follows[training.starts[training.lengths > 0]] = False
        second = np.flatnonzero(follows & (items >= NUM_SPECIAL_TOKENS))
        second = second[items[second - 1] >= NUM_SPECIAL_TOKENS]
        pairs, self.times = np.unique(items[second - 1] * vocab_size + items[second], return_counts=True)
        self.followers = pairs % vocab_size
        self.offsets = np.searchsorted(pairs // vocab_size, np.arange(vocab_size + 1))
        self.inputs = held_out.inputs

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        last = self.inputs.items.cpu().numpy()[self.inputs.starts[users] + self.inputs.lengths[users] - 1]
        last = np.where(self.inputs.lengths[users] > 0, last, 0)  # nothing follows [PAD]
        counts = self.offsets[last + 1] - self.offsets[last]
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(self.offsets[last] - (ends - counts), counts)
        plan = np.stack([np.repeat(np.arange(len(users)), counts), self.followers[places], self.times[places]])
        rows, items, times = to_device(torch.from_numpy(plan), self.popularity.device)
        return self.popularity.repeat(len(users), 1).index_put((rows, items), times.float(), accumulate=True)
