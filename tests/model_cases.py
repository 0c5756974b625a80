"""Small models, histories, and batches of them, for the tests of the model."""

import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


BLOCKS = {"compress_block_size": 8, "compress_stride": 4, "selection_block_size": 4, "short_term_block_size": 4}


def config(**kwargs) -> BlossomRecConfig:
    settings = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24} | BLOCKS
    return BlossomRecConfig(**(settings | kwargs))


def recommender(**kwargs) -> BlossomRecForSequentialRecommendation:
    return BlossomRecForSequentialRecommendation(config(**kwargs)).double().eval()


def histories(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(2, 60, (n,)) for n in lengths]


def padded(rows: list[torch.Tensor], side: str, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, the right, or anywhere, and their mask."""
    length = max(map(len, rows)) + extra
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        if side == "anywhere":
            place = torch.randperm(length)[: len(row)].sort().values
        else:
            place = torch.arange(len(row)) + (length - len(row) if side == "left" else 0)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def packed(rows: list[torch.Tensor]) -> dict:
    lengths = torch.tensor([0, *map(len, rows)])
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows])[None],
        "cu_seq_lens_q": lengths.cumsum(0).int(),
        "cu_seq_lens_k": lengths.cumsum(0).int(),
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
