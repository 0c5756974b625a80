"""
Train a model with the stream of `stream.py` on the built-in data set, save it and load it again. About a minute on a CPU.

    python examples/custom_stream/train.py
"""

import stream  # noqa: F401  registers "compressed"
from transformers import AutoModelForCausalLM, set_seed

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.data import build_sequences, generate_log, split
from blossomrec_hf.evaluation import evaluate
from blossomrec_hf.training import LoopArguments, train


set_seed(0)
dataset, tokenizer = build_sequences(generate_log())
config = BlossomRecConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=128,
    hidden_dropout_prob=0.1,
    attention_types="blossom+compressed",
)
model = BlossomRecForSequentialRecommendation(config)
args = LoopArguments(
    output_dir="runs/custom_stream", tokens_per_step=2048, learning_rate=3e-3, warmup_steps=50, num_train_epochs=12
)
train(model, split(dataset, "train"), split(dataset, "validation"), args=args, tokenizer=tokenizer)
print(f"test NDCG@10 {evaluate(model, split(dataset, 'test'))['ndcg@10']:.3f}")

# Elsewhere, without `import stream`: the checkpoint has the file, and `trust_remote_code` allows to run it.
loaded = AutoModelForCausalLM.from_pretrained("runs/custom_stream", trust_remote_code=True)
print(f"after loading {evaluate(loaded, split(dataset, 'test'))['ndcg@10']:.3f}")
