"""The benchmark of shared prompts runs, counts its tokens right and writes what it says."""

import json

import pytest

from benchmarks.prompt_sharing import main, table
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401


def test_prompt_sharing(tmp_path, capsys):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"config": tiny.MODEL, "tokenizer": str(tmp_path / "tokenizer")}
    sizes = ["--length", "40", "--responses", "3", "--groups", "2", "--rounds", "1", "--shares", "0.25", "0.75"]
    main(["--model", json.dumps(model), *sizes, "--precision", "fp32", "--out", str(tmp_path / "r.json")])
    content = json.loads((tmp_path / "r.json").read_text())
    low, high = content["rows"]
    assert content["environment"]["cpu"] and content["environment"]["versions"]["torch"] in table(content)
    assert table(content).count("\n| ") == 2
    assert (low["prompt"], low["response"]) == (10, 29) and (high["prompt"], high["response"]) == (30, 9)
    shared, own = 2 * (30 + 27), 2 * 3 * 39
    assert high["tokens"] == {
        "shared, segments": shared,
        "shared, dense mask": shared,
        "packed, segments": own,
        "padded": own,
    }
    assert high["fewer_tokens"] == pytest.approx(high["tokens"]["padded"] / high["tokens"]["shared, segments"])
    assert all(seconds > 0 for row in (low, high) for seconds in row["seconds"].values())
    assert capsys.readouterr().out.count("times fewer tokens") == 2
