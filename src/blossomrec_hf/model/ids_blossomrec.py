"""Special ids of the vocabulary, of labels, of event types and of times."""

NUM_SPECIAL_IDS = 2  # [PAD] is 0 and [UNK] is 1; the items follow
IGNORE_INDEX = -100  # the label of a position without a target, as in `torch` and `transformers`
UNKNOWN_TYPE = -1  # an event type that is not known
UNKNOWN_TIME = -(2**63)  # a `prediction_time` that is not known, the smallest int64
