import torch
from authors_cases import AuthorsModel, scores_agree
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_theirs_to_ours_and_back(run_command, tmp_path):
    theirs = AuthorsModel(30, 16, 4).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pth")
    (tmp_path / "items.txt").write_text("".join(f"film {n}\n" for n in range(30)))
    run_command("convert", "--checkpoint", tmp_path / "theirs.pth", "--num_attention_heads", 4, "--output_dir",
        tmp_path / "ours", "--items", tmp_path / "items.txt",
    )  # fmt: skip
    model, tokenizer = (kind.from_pretrained(tmp_path / "ours") for kind in (AutoModelForCausalLM, AutoTokenizer))
    scores_agree(theirs.double(), model.double(), tolerance=1e-4)  # folded in float32
    assert tokenizer.encode_items(["film 0", "film 29"]) == [2, 31]

    run_command("convert", "--model", tmp_path / "ours", "--output_file", tmp_path / "back.pth")
    back = AuthorsModel(30, 16, 4)
    back.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"])
    scores_agree(back.double().eval(), model)
