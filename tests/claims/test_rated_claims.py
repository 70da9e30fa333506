"""CPO and its baselines on human ratings: the judge, every method on a very small model, tables and picture."""

import itertools
import json
import platform
import random
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.claims import rated_lab, rated_report, savings
from benchmarks.claims import run as claims
from benchmarks.claims.rated_lab import OBJECTIVES, RatedBudget, RatedLab, agreement, rated, words_in_common
from benchmarks.claims.run import METHODS, Run
from cpo_kernels.data.records import Record, Response
from cpo_kernels.demo.model import build_model, build_tokenizer
from cpo_kernels.demo.world import World
from cpo_kernels.evaluation.pareto import hypervolume

ROOT = Path(__file__).parents[2]


def answer(text: str, honesty: float, helpfulness: float) -> Response:
    return Response(text, {"honesty": honesty, "helpfulness": helpfulness})


RATED = [answer("The earth is round.", 5, 5), answer("The earth is flat.", 1, 5), answer("I have no comment.", 5, 1)]

# -------------------------------------------------------------------------------------------------------------- judge


def test_words_in_common_is_their_f1():
    assert words_in_common("It's FLAT!", "its flat") == 1
    assert words_in_common("a a b", "a c") == pytest.approx(2 * 1 / 5)  # one "a" of the two
    assert words_in_common("a", "b") == words_in_common("", "") == 0


def test_an_answer_is_rated_as_the_nearest_one():
    assert rated("earth is flat", RATED) == {"honesty": 1, "helpfulness": 5}
    assert rated("no comment", RATED) == {"honesty": 5, "helpfulness": 1}
    assert rated("the earth is", RATED) == {"honesty": 3, "helpfulness": 5}  # as near to both
    assert rated("bananas", RATED) == rated("", RATED) == {"honesty": 1, "helpfulness": 1}


def test_agreement_leaves_copies_out():
    copies = [answer("The earth is flat.", 1, 5), answer("the earth is flat", 1, 5), answer("Earth: a ball.", 5, 5)]
    found = agreement([Record("Q", tuple(copies))])
    assert found["honesty"] == {"low": 0.0, "high": 0.0} and found["helpfulness"] == {"high": 1.0}


def test_control_moves_one_tag(tmp_path, rows, monkeypatch):
    lab = RatedLab(0, small(rows), tmp_path)
    monkeypatch.setattr(lab, "likelihood", lambda model: {})
    both, terse, false = [[5.0, 5.0]] * 4, [[5.0, 1.0]] * 4, [[5.0, 5.0]] * 4
    found = lab.control(None, [both, terse, false, both, both])
    assert found == {"correlation": {"helpfulness": 1.0, "honesty": 0.0}, "likelihood": {}}


def test_likelihood_compares_answers_that_fit_either_level(tmp_path, rows, monkeypatch):
    """Honesty: answers rated (5, 5) and (1, 5), under both tags; questions without one of them have no share."""
    lab, scored = RatedLab(0, small(rows), tmp_path), []

    def score(model, template, records, conditions):
        scored.append((records, conditions))
        return [
            torch.tensor([[float(r.ratings == dict(c)) for r in record.responses] for c in conditions])
            for record in records
        ]

    monkeypatch.setattr(rated_lab, "score_answers", score)
    lab.held_out = [Record("Q", (*RATED, answer("It is round.", 5, 5), answer("THE EARTH IS ROUND", 5, 5)))]
    lab.held_out.append(Record("R", tuple(RATED[:1])))
    assert lab.likelihood(None) == {"honesty": [1.0], "helpfulness": [1.0]}
    (record, _), conditions = scored[0]
    assert conditions == ({"honesty": 5, "helpfulness": 5}, {"honesty": 1, "helpfulness": 5})
    assert [r.text for r in record.responses] == ["THE EARTH IS ROUND", "It is round.", "The earth is flat."]


def test_the_classifier_learns_what_words_say(tmp_path, rows):
    """On the demo's world a refusal is told from an answer, on questions that it was not fitted on."""
    lab = RatedLab(0, small(rows), tmp_path)
    accuracy = lab.judges()["classifier"]["helpfulness"]
    assert accuracy["low"] > 0.7 and accuracy["high"] > 0.7
    asked = [(record.prompt, record.responses[0].text) for record in lab.held_out]
    again = RatedLab(0, small(rows), tmp_path).classifier  # as it was fitted
    assert again.rate(asked) == lab.classifier.rate(asked)
    assert {level for row in again.rate(asked) for level in row} <= {1.0, 5.0}


def test_the_search_holds_training_questions_out(tmp_path, rows):
    lab, search = (RatedLab(seed, small(rows), tmp_path / str(seed)) for seed in (0, claims.SEARCH_SEED))
    prompts = [{record.prompt for record in part} for part in (lab.held_out, search.held_out, search.records)]
    assert len(prompts[1]) == 5 and not prompts[0] & (prompts[1] | prompts[2]) and not prompts[1] & prompts[2]


# ------------------------------------------------------------------------------------------------------------ the run


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Rated answers in TruthfulQA's columns, about the demo's world; a tiny model in place of SmolLM2."""
    world, path = World(0, 3), tmp_path / "rated.jsonl"
    with open(path, "w") as file:
        for question, answers in world.rated_questions(30, 0, num_answers=6):
            for text in answers:
                ratings = world.rate(question, text)
                row = {"truthful": int(ratings["honesty"] == 5), "informative": int(ratings["helpfulness"] > 2)}
                file.write(json.dumps({"question": question.prompt, "answer": text} | row) + "\n")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 32, 1)
    monkeypatch.setattr(rated_lab, "load_model", lambda config: (model, tokenizer))
    return path


def small(path) -> RatedBudget:
    return RatedBudget(str(path), search_questions=5, supervised_steps=2, responses=4, preference_steps=2, groups=3)


def test_every_method_runs(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(RatedLab, "max_new_tokens", 8)
    monkeypatch.setattr(RatedLab, "settings", {m: tried[:1] for m, tried in RatedLab.settings.items()})
    torch.set_num_threads(1)
    run = Run(tmp_path / "run", RatedLab, small(rows))
    lines = list(run.work([0]))
    assert len(lines) == len(METHODS)  # one setting each: nothing is searched
    content = run.results()
    lab = run.lab(0)
    assert content["judges"]["nearest"] == agreement(lab.held_out) and len(lab.held_out) == 6 and len(lab.records) == 24
    counts = {m: len(rows[0]["points"]) for m, rows in content["methods"].items()}
    assert counts == {
        "sft": 1,
        "cpsft": 5,
        "cpo": 5,
        "cpo_soup": 5,
        "cpo_modpo": 5,
        "ric": 5,
        "dpo_sum": 1,
        "dpo_single": 2,
        "soup": 5,
        "modpo": 5,
    }
    for row in (row for rows in content["methods"].values() for row in rows):
        for point in row["points"]:
            by_question = torch.tensor(point["by_question"], dtype=torch.float64)
            assert point["scores"] == pytest.approx(by_question.mean(0).tolist())
    ends = [content["methods"][m][0]["points"] for m in ("soup", "modpo")]
    singles = {p["label"]: p["by_question"] for p in content["methods"]["dpo_single"][0]["points"]}
    for points in ends:  # all weight on one objective: DPO on it
        assert points[0]["by_question"] == singles["helpfulness"] and points[-1]["by_question"] == singles["honesty"]
    assert all(text != "not measured" for text in rated_report.sections(content).values())


def test_the_study_needs_its_data(tmp_path):
    with pytest.raises(SystemExit):
        claims.main(["--study", "truthfulqa"])
    with pytest.raises(SystemExit):
        claims.main(["--data", "x.jsonl"])
    missing = str(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"no file .*x\.jsonl: give TruthfulQA's rated answers with --data"):
        claims.main(["--study", "truthfulqa", "--data", missing, "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_run_is_of_one_data_file(tmp_path, rows):
    Run(tmp_path / "run", RatedLab, small(rows))
    moved = tmp_path / "elsewhere" / rows.name
    moved.parent.mkdir()
    moved.write_bytes(rows.read_bytes())
    plan = (tmp_path / "run" / "plan.json").read_text()
    Run(tmp_path / "run", RatedLab, small(moved))
    assert str(tmp_path) not in plan and rows.name in plan
    with open(moved, "a") as file:
        file.write(rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="another plan"):
        Run(tmp_path / "run", RatedLab, small(moved))


# --------------------------------------------------------------------------------------------------- tables and picture


def made_up(questions: int = 40) -> dict:
    """A results file with random figures, CPO's the best."""
    rng = random.Random(0)
    counts = dict.fromkeys(METHODS, 5) | {"sft": 1, "dpo_sum": 1, "dpo_single": 2}

    def point(number, best):
        by_question = [[5.0 if best else rng.choice([1.0, 5.0]) for _ in OBJECTIVES] for _ in range(questions)]
        if best and number == 2:  # honesty follows its tag, helpfulness does not
            by_question = [[1.0, 5.0]] * questions
        means = [sum(column) / questions for column in zip(*by_question, strict=True)]
        made = {"label": str(number), "scores": means, "similar": 0.5}
        return made | {"by_question": by_question, "by_classifier": by_question}

    def row(method):
        asked = method.startswith("cp") or method == "ric"
        made = {"seed": 0, "cost": None}
        made["points"] = [point(i, method.startswith("cpo")) for i in range(counts[method])]
        return made | (
            {"correlation": {}, "likelihood": {"honesty": [1.0] * 20, "helpfulness": [0.0, 1.0] * 10}} if asked else {}
        )

    return {
        "plan": {"budget": vars(RatedBudget(__file__))},
        "judges": {"nearest": {o.name: {"low": 0.8, "high": 0.6} for o in OBJECTIVES}},
        "search": {"seed": 100, "tried": [], "chosen": {"cpo": [5e-5, 0.3, "", 0.0, 2.0]}},
        "versions": {"torch": "0", "transformers": "0"},
        "methods": {method: [row(method)] for method in METHODS},
    }


def test_tables_say_what_is_met():
    content = made_up()
    tables = rated_report.sections(content)
    lines = tables["rated claims targets"].splitlines()
    assert ["missed" in line for line in lines] == [False, False, False, False, False, True]
    assert "| **CPO** | 1 × 160 | 1 | 1.000 [1.000, 1.000] | 5.00 [5.00, 5.00] |" in tables["rated claims"]
    assert "| 1.00, 0.00 | 100% [100%, 100%] |" in tables["rated claims"]
    content["methods"]["soup"][0]["points"][0] = content["methods"]["cpo"][0]["points"][0]
    lines = rated_report.sections(content)["rated claims targets"].splitlines()
    assert all("missed against Rewarded Soups" in line for line in lines[:2])
    content["methods"] |= {"soup": [], "cpo_modpo": []}
    assert "minus Rewarded Soups" not in rated_report.sections(content)["rated claims paired"]
    assert set(rated_report.sections({}).values()) == {"not measured"}


def test_the_search_shows_what_was_tried():
    row = {"method": "cpo", "setting": [5e-5, 0.3, "", 0.0, 2.0], "worth": 0.6, "hypervolume": 0.6, "seconds": 90.0}
    row |= {"best": {"honesty": 4.5, "helpfulness": 4.25}, "correlation": {"honesty": 0.3, "helpfulness": 0.5}}
    row |= {"likelihood": {"honesty": [1.0, 0.5], "helpfulness": [0.5, 0.5]}}
    other = {"method": "dpo_single", "setting": [5e-5, 0.0, "all", 0.0, 1.0], "worth": 0.9, "hypervolume": 0.3}
    other |= {"best": row["best"], "seconds": 30.0}
    content = {"plan": {"budget": vars(RatedBudget(__file__))}, "search": {"seed": 100, "tried": [row, other]}}
    first, second = rated_report.search_table(content).splitlines()[2:4]
    assert (
        "| **CPO** | 5e-05 with NLL × 0.3 weight of honesty 2 | 0.600 | 0.600 | 4.50 | 4.25 | 0.30, 0.50 | 75% ["
        in first
    )
    assert "| DPO, one objective each | 5e-05 from SFT (all) | 0.900 | 0.300 | 4.50 | 4.25 | - | - | - |" in second
    assert "2 minutes of one thread" in rated_report.search_table(content)


def test_volumes_are_hypervolumes():
    """Also of points that are equal, dominated, or worth nothing."""
    points = torch.rand(6, 5, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[0, :, 1] = points[0, :, 0]
    points[1, :, :, 1] = points[1, :, :1, 1]
    points[2, :, 2] = 0
    found = rated_report.volumes(points)
    for i, j in itertools.product(range(6), range(5)):
        assert found[i, j].item() == pytest.approx(hypervolume(points[i, j], [0.0, 0.0]), abs=1e-12)


def test_intervals_draw_questions():
    """One point, every second answer the best of only one objective: its mean is a mean of independent questions."""
    values = torch.zeros(1, 1, 400, 2, dtype=torch.float64)
    values[:, :, ::2, 0] = 1.0
    samples = rated_report.resampled(values)
    assert samples[:, 0].abs().max() == 0  # nothing is dominated: the other objective is at its lowest
    low, high = rated_report.interval(samples[:, 1])
    half = 1.96 * 4 * (0.25 / 400) ** 0.5
    assert (low, high) == (pytest.approx(3 - half, abs=0.05), pytest.approx(3 + half, abs=0.05))


def test_figure_shows_every_method():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = rated_report.figure(made_up())
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert sorted(names) == sorted(row[0] for row in rated_report.METHODS.values())
    matplotlib.pyplot.close(figure)


# ------------------------------------------------------------------------------- what shared prompts and filters save


def test_savings_are_ratios_to_padded_rows():
    seconds = {"shared": 3.0, "packed": 6.0, "padded": 12.0, "shared, filtered": 1.8}
    kinds = {kind: {"seconds": s, "tokens": 1000 * s, "low": s - 1, "high": s + 1} for kind, s in seconds.items()}
    environment = {
        "cpu": "X",
        "cpu_capability": "AVX2",
        "threads": 1,
        "versions": {"torch": "2"},
        "date": "2026-01-02T",
    }
    content = {"kinds": kinds, "steps": 12, "precision": "bf16", "environment": environment | {"device": "cpu"}}
    lines = savings.table(content).splitlines()
    assert lines[2:6] == [
        "| shared prompts | 3,000 | 3.00 (2.00 to 4.00) | 0.25 |",
        "| packed | 6,000 | 6.00 (5.00 to 7.00) | 0.50 |",
        "| padded | 12,000 | 12.00 (11.00 to 13.00) | 1.00 |",
        '| shared prompts, `filter_eps: "auto"` | 1,800 | 1.80 (0.80 to 2.80) | 0.15 |',
    ]
    assert lines[-1].endswith("bf16, torch 2; 2026-01-02; means of 12 steps.")


def test_savings_are_means_over_turns():
    """The kinds take turns after one that computes the reference's log-probs, whose steps do not count."""
    taken = []

    def turn(kind):
        taken.append(kind)
        number = len(taken)  # 1 for the reference's
        return [(100.0 * number, 10.0), (100.0 * number + 2, 20.0)]

    measured = savings.measure(turn, 2)
    kinds = list(savings.KINDS)
    assert taken == ["shared", *kinds, *kinds]
    for i, kind in enumerate(kinds):
        first, second = 100.0 * (2 + i), 100.0 * (2 + len(kinds) + i)
        want = {"seconds": (first + second) / 2 + 1, "tokens": 15.0, "low": first + 1, "high": second + 1}
        assert measured[kind] == want


@pytest.mark.parametrize("kind", savings.KINDS)
def test_a_turn_leaves_its_first_step_out(tmp_path, rows, monkeypatch, kind):
    """Each kind is the study's CPO but for its rows and filter; `tokens` of the metrics are those so far."""
    lab = RatedLab(claims.SEARCH_SEED, small(rows), tmp_path)
    given = []

    def train(config, **objects):
        given.append((config, objects["records"]))
        steps = [(9.0, 100, 0.5), (1.0, 300, 0.2), (2.0, 390, 0.1)]
        metrics = [{"step": 0, "eval_loss": 1.0}]
        metrics += [{"seconds": s, "tokens": tokens, "padding": padding} for s, tokens, padding in steps]
        return SimpleNamespace(metrics=metrics)

    monkeypatch.setattr(savings, "train", train)
    assert savings.turn(lab, kind, 3) == [(1.0, pytest.approx(250)), (2.0, pytest.approx(100))]
    ((config, records),) = given
    form, eps, _ = savings.KINDS[kind]
    training = config["training"]
    assert (config["stage"], training["rows"], training["max_steps"]) == ("cdpo", form, 3)
    assert config["loss"] == {"beta": lab.budget.beta} | ({"filter_eps": eps} if eps else {})
    assert config["conditions"] == lab.asked_for | {"per_prompt": lab.budget.conditions}
    assert training["batch_size"] == lab.budget.groups // lab.budget.conditions
    assert records == lab.records[: 3 * training["batch_size"]]


def test_savings_are_measured_and_written(tmp_path, rows, monkeypatch, capsys):
    """The trainer itself on the tiny model: padding makes most tokens, shared prompts fewest; one turn of two steps."""
    monkeypatch.setattr(savings, "RatedBudget", lambda data: small(data))
    monkeypatch.setattr(savings, "SEARCH_SEED", 0)  # of 24 questions
    tunables = []

    def here(function, *args, **options):
        tunables.append(options["tunables"])
        return function(*args)

    monkeypatch.setattr(savings, "in_new_process", here)
    out = tmp_path / "savings.json"
    assert savings.main(["--data", str(rows), "--out", str(out), "--steps", "2", "--rounds", "1"]) == 0
    content = json.loads(out.read_text())
    tokens = {kind: row["tokens"] for kind, row in content["kinds"].items()}
    assert tokens["shared"] == tokens["shared, filtered"] < tokens["packed"] < tokens["padded"]
    assert content["steps"] == 1 and all(0 < row["low"] == row["seconds"] for row in content["kinds"].values())
    assert savings.table(content) in capsys.readouterr().out
    assert tunables == ["", "", "", "", "", savings.KEEP]


def faults(rounds):
    """Page faults of writing a new block of 64 MiB, for each round: 16,384 pages, or 32 huge ones."""
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(rounds):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return [after - before for before, after in itertools.pairwise(counts)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")
def test_freed_memory_is_kept_where_the_kind_says_so(monkeypatch):
    """The settings of the documentation: from the second block on no page is cleared again."""
    assert savings.KEEP in (ROOT / "docs" / "machines.md").read_text()
    assert savings.KEEP in (ROOT / "recipes" / "truthfulqa.sh").read_text()
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # restored after the test
    assert max(savings.in_new_process(faults, 20, tunables=savings.KEEP)[1:]) < 16
    assert min(savings.in_new_process(faults, 3, tunables="")) >= 32


@pytest.mark.parametrize("wrong", [["--steps", "1"], ["--rounds", "0"]])
def test_savings_need_a_step_that_counts(wrong, rows, tmp_path, capsys):
    with pytest.raises(SystemExit):
        savings.main(["--data", str(rows), "--out", str(tmp_path / "x.json"), *wrong])
    assert "--steps must be at least 2 and --rounds at least 1, got" in capsys.readouterr().err
