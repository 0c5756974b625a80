"""Special ids of the vocabulary and of labels."""

NUM_SPECIAL_IDS = 2  # [PAD] is 0 and [UNK] is 1; the items follow
IGNORE_INDEX = -100  # the label of a position without a target, as in `torch` and `transformers`
