import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


def test_writes_a_program(run_command, tmp_path):
    model = BlossomRecForSequentialRecommendation(
        BlossomRecConfig(vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    ).eval()
    model.save_pretrained(tmp_path / "model")
    printed = run_command("export", "--model", tmp_path / "model", "--output", tmp_path / "out" / "scorer.pt2")
    assert printed.startswith("Wrote")
    ids = torch.randint(2, 30, (3, 19))
    scores = torch.export.load(tmp_path / "out" / "scorer.pt2").module()(ids, torch.ones_like(ids))
    torch.testing.assert_close(scores[:, 2:], model(ids).logits[:, -1, 2:], rtol=0, atol=1e-4)
    error = run_command(
        "export", "--model", tmp_path / "model", "--output", tmp_path / "scorer.txt", status=2, field="stderr"
    )
    assert "--output" in error
