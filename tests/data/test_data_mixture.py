"""The official mixture by its counts; `cpo-kernels data`: statistics, previews, examples."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from cpo_kernels.cli import main
from cpo_kernels.data.conditions import Group, prepare
from cpo_kernels.data.packing import encode
from cpo_kernels.data.preparation import load_data
from cpo_kernels.data.records import Record, Response
from cpo_kernels.data.statistics import pair_counts, statistics
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.objectives import Objective, value_gap
from cpo_kernels.recipe.config import read_config, write_config
from tests.data.test_data_sources import objectives, ultrafeedback, ultrasafety, write
from tests.support import tiny

RECIPES = Path(__file__).parents[2] / "recipes"


def official(tmp_path, stage="cdpo", shrink=100):
    """The recipe on rows of the published schemas, a hundredth of its counts."""
    rng = random.Random(0)

    def rating():
        return rng.choice(["1", "2", "3", "4", "5", "5", "N/A"])

    feedback = [ultrafeedback(f"say {i}", *((rating(), rating()) for _ in range(4))) for i in range(300)]
    safety = [ultrasafety(f"do {i}", *(rng.choice([0, 1]) for _ in range(4))) for i in range(90)]
    config = read_config(RECIPES / f"official_{stage}.yaml", ["template.prompt='{tags}{prompt}'"])
    config.data.train[0].path = str(write(tmp_path / "feedback.jsonl", feedback))
    config.data.train[1].path = str(write(tmp_path / "safety.jsonl", safety))
    for entry in config.conditions.mixture:
        entry.count = entry.count and entry.count // shrink
    return config


def test_official_mixture(tmp_path):
    config = official(tmp_path)
    records, _, names = load_data(config, None, None, {})
    draws = prepare("cdpo", records, names, config.conditions, 0)
    groups = [group for (group,) in draws.units]
    pairs = Counter()
    for group in groups:
        pairs[tuple(sorted(group.condition.items()))] += len(group.pairs)
        asked, rated = set(group.condition), {name for r in group.responses for name in r.ratings}
        best = asked == rated and all(
            level == (1 if name == "harmlessness" else 5) for name, level in group.condition.items()
        )
        assert group.tags == ({} if best else group.condition)  # best on everything shows no tags, best on one does
        safety = group.prompt.startswith("do")
        assert rated <= ({"harmlessness"} if safety else {"helpfulness", "honesty"})
    assert draws.counts["short"] == 0 and draws.counts["pairs"] == sum(pairs.values()) == 240 * 3 + 89 * 2
    by_objectives = Counter()
    for condition, count in pairs.items():
        by_objectives[tuple(name for name, _ in condition)] += count
    assert by_objectives == {("helpfulness", "honesty"): 240, ("helpfulness",): 240, (): 240, ("harmlessness",): 178}
    assert pairs[("helpfulness", 5), ("honesty", 5)] >= 120
    levels = {level: pairs[(("helpfulness", level),)] for level in (1, 2, 3, 4, 5)}
    assert levels == {5: 120, 4: 30, 3: 30, 2: 30, 1: 30}
    assert pairs[(("harmlessness", 0),)] == pairs[(("harmlessness", 1),)] == 89
    for group in groups:  # a condition is what one of the responses got, and no pair is a tie
        levels_of = [r.ratings for r in group.responses]
        assert any(group.condition.items() <= ratings.items() for ratings in levels_of)
        assert pair_counts(group, names)["pairs"] == len(group.pairs)


def test_a_mixture_says_how_many_pairs_it_lacks(tmp_path):
    config = official(tmp_path, shrink=1)
    records, _, names = load_data(config, None, None, {})
    draws = prepare("cdpo", records, names, config.conditions, 0)
    assert draws.counts["short"] == 89_932 - draws.counts["pairs"] > 80_000
    entry = config.conditions.mixture[8]
    used = [g for (g,) in draws.units if "harmlessness" in g.condition and g.condition["harmlessness"] == 1]
    assert entry.count == 8966 and len(used) == len({g.prompt for g in used})  # a prompt once an entry


def test_stage_one_draws_responses_by_count(tmp_path):
    config = official(tmp_path)
    records, _, names = load_data(config, None, None, {})
    draws = prepare("cpsft", records, names, config.conditions, 0)
    shown = Counter(len(u[0].condition) for u in draws.units)
    assert len(draws.units) == 720 + 178 - draws.counts["short"] and shown[2] + shown[0] + shown[1] == len(draws.units)
    for (group,) in draws.units:
        assert group.condition.items() <= group.responses[0].ratings.items()
    whole = official(tmp_path, "cpsft")
    records, _, _ = load_data(whole, None, None, {})
    draws = prepare("cpsft", records, names, whole.conditions, 0)
    assert len(draws.units) == sum(bool(r.ratings) for record in records for r in record.responses)


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"mixture": [{"count": 5}, {"share": 1}]}, r"give every entry a count or none, got \[5, None\]"),
        ({"mixture": [{"count": -5}]}, r"count: -5 is not in \[0, inf\)"),
        ({"mixture": [{"count": 5}], "per_prompt": 2}, "per_prompt 2 and draws 1"),
        ({"mixture": [{"levels": {"humour": 1}}]}, "'humour' is not an objective"),
        ({"mixture": [{"rated": ["humour"]}]}, "'humour' is not an objective"),
    ],
)
def test_bad_mixtures(keys, reason):
    with pytest.raises(ValueError, match=reason):
        prepare(
            "cdpo",
            tiny.records(3),
            objectives(1, 5, "honesty", "helpfulness"),
            read_config({"conditions": keys}).conditions,
            0,
        )


# -------------------------------------------------------------------- statistics


def test_conflicting_and_turned_pairs():
    names = [Objective("a", 1, 5), Objective("b", 1, 5)]
    texts = [{"a": 5.0, "b": 1.0}, {"a": 2.0, "b": 3.0}, {"a": 2.0}, {}]
    responses = tuple(Response(str(i), ratings) for i, ratings in enumerate(texts))
    pairs = ((0, 1), (0, 2), (1, 2), (2, 3))
    free = Group("p", {}, {}, responses, pairs)
    assert pair_counts(free, names) == {"pairs": 4, "conflicting": 1, "turned": 0}
    low = Group("p", {}, {"a": 1.0}, responses, pairs)  # 0 is worse than 1 and 2 on a, which no condition would say
    assert value_gap([5, 1], [2, 3], None, names) > 0 > value_gap([5, 1], [2, 3], [1, float("nan")], names)
    assert pair_counts(low, names) == {"pairs": 4, "conflicting": 1, "turned": 2}


def test_statistics_count_what_is_there():
    records = [Record("p", (Response("ab", {"a": 5.0, "b": 1.0}), Response("c", {"a": 0.0}), Response("d")))]
    names = [Objective("a", 0, 5), Objective("b", 0, 5)]
    config = read_config({"conditions": {"strip_best": 0}})
    draws = prepare("cdpo", records, names, config.conditions, 0)
    units = encode(draws, PromptTemplate(tiny.tokenizer(), config.template, names), names, 100, 100)
    found = statistics(records, draws, units, names)
    assert found["records"] == {
        "prompts": 1,
        "responses": 3,
        "ratings": {"a": {"0": 1, "5": 1, "missing": 1}, "b": {"1": 1, "missing": 2}},
    }
    assert found["drawn"]["pairs"] == found["pairs"]["pairs"] == 1 and found["drawn"]["ties"] == 2
    (condition,) = found["conditions"]
    assert condition in ("a 5, b 1", "a 0") and found["conditions"][condition]["pairs"] == 1
    P = len(units[0][0].prompt)
    assert found["tokens"]["alone"] == 3 * P + 2 + 1 + 1 and found["tokens"]["shared"] == P + 4
    assert found["tokens"]["response"] == {"least": 2, "median": 2, "p95": 3, "most": 3}


def test_data_command(tmp_path, capsys):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = official(tmp_path)
    write_config(config, tmp_path / "recipe.yaml")
    arguments = [
        str(tmp_path / "recipe.yaml"),
        f"--model.tokenizer={tmp_path}/tokenizer",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["data", *arguments, "--preview", "3", "training.progress=false"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- condition:") == 3 and re.search(
        r"pairs: 898, of which conflicting \d+\.\d%, turned", printed
    )
    assert "harmlessness: 0 x " in printed and "tokens per pass:" in printed
    found = json.loads((tmp_path / "out/statistics.json").read_text())
    examples = [json.loads(line) for line in (tmp_path / "out/examples.jsonl").read_text().splitlines()]
    assert len(examples) == found["pairs"]["pairs"] == 898
    tagged = [e for e in examples if e["condition"] == {"harmlessness": 0.0}]
    assert tagged and all(e["prompt"].startswith("< harmlessness: 0 > do ") for e in tagged)
    safety = {row["instruction"]: row["completions"] for row in map(json.loads, open(tmp_path / "safety.jsonl"))}
    for example in tagged:  # asked for 0, the harmful one is chosen
        completions = safety[example["prompt"].removeprefix("< harmlessness: 0 > ")]
        ratings = {c["response"]: c["annotations"]["harmlessness"][0]["Rating"] for c in completions}
        assert (ratings[example["chosen"]], ratings[example["rejected"]]) == (0, 1)
    assert main(["data", *arguments, "--stage", "cpsft", "--preview", "1", "--training.progress", "false"]) == 0
    assert main(["data", *arguments, "--data.trian=x"]) == 2
