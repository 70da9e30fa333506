"""The benchmark of trainings with filtered gradients: what its variants change, what it writes, and how it goes on."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import filtered_training
from benchmarks.filtered_report import figure
from benchmarks.filtered_training import EXACT, FIXED, VARIANTS, main
from cpo_kernels.demo.run import Size
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401


@pytest.fixture
def peaked(tmp_path):
    """Arguments for a model of 2,000 words that puts its softmax on few of them, as a trained one does."""
    options = tiny.MODEL | {"vocab_size": 2000, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**options))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} "
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"say {i}", "chosen": f"{i} " * 5, "rejected": "no " * (i % 7 + 1)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl")]
    return ["--part", "smollm2", *data, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "r.json")]


def test_variants(peaked, tmp_path, capsys):
    main([*peaked, "--steps", "3"])
    content = json.loads((tmp_path / "r.json").read_text())
    part = content["smollm2"]
    rows = {row["variant"]: row for row in part["variants"]}
    assert list(rows) == list(VARIANTS) and all(len(row["losses"]) == 3 for row in rows.values())
    assert part["settings"]["held_out_pairs"] == 4 and capsys.readouterr().out.count("\n| ") == 1 + len(rows)
    assert "live_share" not in rows[EXACT] and rows[FIXED]["live_share"] < 0.5
    assert rows[FIXED]["exact_share"] == 0
    off = {name: row["off"]["gradient"] for name, row in rows.items()}
    whole, both, dropped = (off[f"{FIXED}{kind}"] for kind in ("", ", head too", ", head too, tail dropped"))
    assert whole["body"] == pytest.approx(both["body"], rel=1e-12)  # the last bit of a norm differs on an Intel Xeon
    assert 0 < both["body"] < dropped["body"] < 0.1
    assert whole["others"] < 1e-4 < 0.01 < both["others"] < dropped["others"] < 1
    assert off["bfloat16"]["body"] < 0.1
    assert figure(content).axes[1].get_lines()


def test_goes_on_after_a_kill(peaked, tmp_path, monkeypatch):
    main([*peaked, "--steps", "1"])
    finished = (tmp_path / "r.json").read_text()
    content = json.loads(finished)
    rows = content["smollm2"]["variants"]
    del rows[2:]
    (tmp_path / "r.json").write_text(json.dumps(content | {"demo": {"variants": []}}))
    main([*peaked, "--steps", "1"])
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["demo"] == {"variants": []} and again["smollm2"]["variants"][:2] == rows

    def same(row):
        return {name: value for name, value in row.items() if name != "seconds"}

    assert list(map(same, again["smollm2"]["variants"])) == list(map(same, json.loads(finished)["smollm2"]["variants"]))
    with pytest.raises(SystemExit, match="other settings"):
        main([*peaked, "--steps", "2"])


def test_demo(tmp_path, monkeypatch):
    small = Size(people=3, prompts=60, hidden_size=32, num_layers=1, cpsft_epochs=1.0)
    monkeypatch.setattr(filtered_training, "Size", lambda: small)
    monkeypatch.setattr(filtered_training, "VARIANTS", {name: VARIANTS[name] for name in (EXACT, "bfloat16, auto")})
    main(["--steps", "2", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "r.json")])
    exact, auto = json.loads((tmp_path / "r.json").read_text())["demo"]["variants"]
    assert exact["held_out"]["accuracy"] > 0 and auto["off"]["step 2"]["body"] < 0.2
    assert exact["losses"] == pytest.approx(auto["losses"], abs=0.01)
