"""
Fine-tuning with `transformers.Trainer`: a trained model learns from new events.

    python examples/quickstart.py     # trains runs/quickstart
    python examples/trainer.py
"""

from transformers import TrainingArguments

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.batches import PackingCollator
from blossomrec_hf.data import build_sequences, generate_log, split
from blossomrec_hf.training import SequentialRecommendationTrainer


path = "runs/quickstart"
model = BlossomRecForSequentialRecommendation.from_pretrained(path)
tokenizer = BlossomRecTokenizer.from_pretrained(path)

# The same vocabulary as in training; `tokenizer=` maps raw ids to it.
dataset, _ = build_sequences(generate_log(), tokenizer=tokenizer)

trainer = SequentialRecommendationTrainer(
    model,
    TrainingArguments(
        "runs/trainer",
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        eval_strategy="epoch",
        report_to="none",
    ),
    train_dataset=split(dataset, "train"),
    eval_dataset=split(dataset, "validation"),
    data_collator=PackingCollator(max_length=200),
    processing_class=tokenizer,
)
trainer.train()
print({name: round(value, 4) for name, value in trainer.evaluate().items() if "@10" in name})
trainer.save_model()  # model and tokenizer; `trainer.push_to_hub()` uploads them with a card
