"""
From a log of interactions to recommendations, in a few lines: the built-in data set, a minute or two of a CPU.

    python examples/quickstart.py
"""

import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data import build_sequences, generate_log, item_counts, split
from blossomrec_hf.evaluation import evaluate
from blossomrec_hf.training import LoopArguments, train


# Any table of users, items and times: a file of any common format, a data frame, or a data set of the Hub.
dataset, tokenizer = build_sequences(generate_log())
print(f"{len(dataset)} users, {tokenizer.num_items} items")

config = BlossomRecConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    hidden_dropout_prob=0.1,
)
model = BlossomRecForSequentialRecommendation(config)
model.item_counts.copy_(torch.as_tensor(item_counts(dataset, len(tokenizer))))  # for users without a history

# Leave-one-out: each user's last item is the test, the one before it validation.
args = LoopArguments(
    output_dir="runs/quickstart", tokens_per_step=2048, learning_rate=3e-3, warmup_steps=50, num_train_epochs=12
)
train(model, split(dataset, "train"), split(dataset, "validation"), args=args, tokenizer=tokenizer)
figures = evaluate(model, split(dataset, "test"))
print(f"test Recall@10 {figures['recall@10']:.3f}, NDCG@10 {figures['ndcg@10']:.3f}")

# Later, or elsewhere: raw item ids in, raw item ids out.
model = BlossomRecForSequentialRecommendation.from_pretrained("runs/quickstart")
tokenizer = BlossomRecTokenizer.from_pretrained("runs/quickstart")
history = tokenizer.decode_items(dataset[0]["input_ids"])[-20:]
batch = tokenizer([history], padding=True, return_tensors="pt")
best = model.recommend(**batch, top_k=5)
print(f"after {history[-5:]}: {tokenizer.decode_items(best.item_ids)[0]}")
