"""
From a log of interactions to recommendations in a few lines, on the built-in data set. Takes about a minute on a CPU.

    python examples/quickstart.py
"""

import torch
from transformers import set_seed

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data import build_sequences, generate_log, item_counts, split
from blossomrec_hf.evaluation import evaluate
from blossomrec_hf.training import LoopArguments, train


set_seed(0)

# Any table of users, items and times: a file in any common format, a data frame, or a data set on the Hub.
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
model.item_counts.copy_(
    torch.as_tensor(item_counts(dataset, len(tokenizer)))
)  # ranks items for users without a history

# Leave-one-out: each user's last item is the test target, and the item before it the validation target.
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
