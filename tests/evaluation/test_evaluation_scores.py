"""Scored answers: the grid, requested against achieved, win rates, and the report of `cpo-kernels eval`."""

import json
import math
import re

import pytest

from cpo_kernels.cli import main
from cpo_kernels.data.records import DataError
from cpo_kernels.demo import scorer as demo_scorer
from cpo_kernels.demo.world import World
from cpo_kernels.evaluation.achieved import judged_scores, win_rates
from cpo_kernels.evaluation.judgements import evaluate, score
from cpo_kernels.evaluation.report import spread, write_report
from cpo_kernels.evaluation.requests import condition_grid, levels, parse_condition, parse_objective, read_prompts
from cpo_kernels.objectives import Objective, TagTemplate
from tests.evaluation.test_scorers import stub  # noqa: F401
from tests.support import tiny
from tests.support.browser import PROGRAM, browser
from tests.support.tiny import one_thread  # noqa: F401

A, B = Objective("a", 1, 5), Objective("b", 0, 1)
NAN = math.nan


# ---- requests


def test_grid_is_every_combination_of_levels():
    assert levels(A) == [1, 2, 3, 4, 5] and levels(B) == [0, 1]
    assert levels(Objective("c", 0, 10)) == [0, 2.5, 5, 7.5, 10] and levels(Objective("c", 0, 0.5))[1] == 0.125
    grid = condition_grid([A, B])
    assert len(grid) == 10 and grid[:3] == [{"a": 1, "b": 0}, {"a": 1, "b": 1}, {"a": 2, "b": 0}]
    assert condition_grid([A, B], ["b=1,0", "a=3"]) == [{"a": 3, "b": 1}, {"a": 3, "b": 0}]
    assert condition_grid([A, B], ["b=1"]) == [{"b": 1}]  # no tag of a


@pytest.mark.parametrize(
    "chosen, reason",
    [("c=1", "unknown objective 'c'; known: a, b"), ("a", "objective=level"), ("a=9", r"9 is outside")],
)
def test_grid_says_what_is_wrong(chosen, reason):
    with pytest.raises(ValueError, match=reason):
        condition_grid([A, B], [chosen])
    with pytest.raises(ValueError, match="a is given twice; write all its levels in one"):
        condition_grid([A, B], ["a=1,2", "b=1", "a=3"])
    with pytest.raises(ValueError, match="a is given twice"):
        parse_condition("a=1,b=0, a=3", TagTemplate([A, B]))
    with pytest.raises(ValueError, match="625 combinations"):
        condition_grid([Objective(name, 1, 5) for name in "abcd"])


def test_objectives_and_prompts_from_the_command_line(tmp_path):
    assert parse_objective("honesty:0:0.5") == Objective("honesty", 0, 0.5)
    with pytest.raises(ValueError, match="name:low:high"):
        parse_objective("honesty")
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert [record.prompt for record in read_prompts(tmp_path / "p.txt")] == ["one", "two"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": [{"role": "user", "content": "two"}]}\n')
    assert [record.prompt for record in read_prompts(tmp_path / "p.jsonl")] == ["one", "two"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"promt": "two"}\n')
    with pytest.raises(DataError, match="p.jsonl:2: no field 'prompt', did you mean 'promt'"):
        read_prompts(tmp_path / "p.jsonl")


# ---- what scores say


def entries(*rows):
    return [{"condition": condition, "scores": scores} for condition, scores in rows]


def test_judged_scores_by_hand():
    found = judged_scores(
        entries(
            ({"a": 1.0, "b": 0.0}, [[1.0, 0.0], [3.0, 0.0]]),
            ({"a": 5.0}, [[5.0, 0.5], [5.0, NAN]]),
            ({"a": 3.0, "b": 1.0}, [[1.0, 1.0], [1.0, 1.0]]),
            ({}, [[3.0, 0.25], [3.0, 0.25]]),
        ),
        [A, B],
    )
    a, b = found["control"]["a"], found["control"]["b"]
    assert [level["achieved"] for level in a["levels"]] == [2, 1, 5] and a["monotonicity"] == 0.5
    assert a["error"] == pytest.approx((0 + 2 + 2 + 2 + 0 + 0) / 6)
    assert b["levels"][0]["answers"] == 2 and b["error"] == 0 and b["correlation"] == 1
    assert found["points"] == [[2, 0], [5, 0.5], [1, 1], [3, 0.25]]
    assert found["front"] == [1, 2]
    # of the unit square: the point (1, 0.5); (0, 1) adds nothing, for it is the worst on a
    assert found["hypervolume"] == pytest.approx(0.5)


def test_a_condition_without_scores_has_no_point():
    found = judged_scores(entries(({"a": 1.0}, [[1.0, NAN]]), ({"a": 5.0}, [[5.0, 1.0]])), [A, B])
    assert found["front"] == [1] and found["hypervolume"] == 1 and "b" not in found["control"]
    nothing = judged_scores(entries(({"a": 1.0}, [[NAN, NAN]])), [A, B])
    assert nothing["control"] == {} and math.isnan(nothing["hypervolume"])


def test_win_rates_by_hand():
    """Two questions under a = 2, and without tags."""
    one = entries(({"a": 2.0}, [[2.0, 1.0], [5.0, 0.0]]), ({}, [[5.0, 1.0], [5.0, NAN]]))
    two = entries(({"a": 2.0}, [[3.0, 1.0], [5.0, 0.0]]), ({}, [[1.0, 1.0], [5.0, 1.0]]))
    rows = win_rates({"one": one, "two": two}, [A, B])
    assert [(r["a"], r["b"], r["asked"], r["mean"], r["questions"]) for r in rows] == [
        ("one", "two", "conditions", 0.75, 2),  # closer to 2 in the first, a tie in the second
        ("one", "two", "no tags", 0.75, 2),  # b is not rated on one side: only a, a tie
    ]
    turned = win_rates({"two": two, "one": one}, [A, B])
    assert [r["mean"] for r in turned] == [0.25, 0.25]
    assert [(r["low"], r["high"]) for r in rows[:1]] == [(0.5, 1.0)]
    unrated = entries(({"a": 2.0}, [[NAN, NAN], [5.0, 0.0]]))
    (row,) = win_rates({"one": unrated, "two": two[:1]}, [A, B])
    assert row["questions"] == 1 and row["mean"] == 0.5


# ---- one model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of a model that saw one step."""
    from cpo_kernels.training.loop import train

    folder = tmp_path_factory.mktemp("scores")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    config = tiny.config("cpsft", run_dir=str(folder / "run"), training={"max_steps": 2, "lr": 1e-2})
    config["model"]["tokenizer"] = str(folder / "tokenizer")
    train(config, records=tiny.records())
    return folder / "run"


def count_letters(prompts, responses):
    """`say xy`: how often x and y stand in the answer, at most 5 and at least 1."""
    pairs = [(p[-2], p[-1], r) for p, r in zip(prompts, responses, strict=True)]
    return [[float(min(5, max(1, r.count(letter)))) for letter in (x, y)] for x, y, r in pairs]


def test_a_model_without_tags_is_asked_once(run):
    from cpo_kernels.evaluation.loading import find_model, load

    model, template = load(find_model(str(run)))
    calls = []

    def scorer(prompts, responses):
        calls.append(len(responses))
        return count_letters(prompts, responses)

    conditions = [{"honesty": 5.0, "helpfulness": 1.0}, {"honesty": 1.0, "helpfulness": 5.0}]
    records = tiny.records(4)
    prompts = [record.prompt for record in records]
    found = evaluate(model, template, records, conditions, tags=False, max_new_tokens=6)
    found = score(found, prompts, template.tags.objectives, scorer)
    assert calls == [4] and len({tuple(entry["answers"]) for entry in found["conditions"]}) == 1
    assert [entry["relative_accuracy"]["mean"] for entry in found["conditions"][:2]] == [0.5, 0.5]
    assert found["control"]["honesty"]["correlation"] == 0 and found["control"]["honesty"]["monotonicity"] == 1
    tagged = evaluate(model, template, records, conditions, likelihood=False, max_new_tokens=6)
    tagged = score(tagged, prompts, template.tags.objectives, scorer)
    assert "relative_accuracy" not in tagged["conditions"][0] and calls[1] > 4
    for entry in tagged["conditions"]:
        assert entry["scores"] == count_letters(prompts, entry["answers"])


def test_demo_scorer_is_the_world(tmp_path, monkeypatch):
    world = World(3, 5)
    (tmp_path / "results.json").write_text(json.dumps({"seed": 3, "size": {"people": 5}}))
    monkeypatch.setenv("CPO_KERNELS_DEMO", str(tmp_path))
    for question, answers in world.rated_questions(40, seed=1):
        assert demo_scorer.question(question.prompt) == question
        scores = demo_scorer.score([question.prompt] * len(answers), answers)
        assert scores == [[float(x) for x in world.rate(question, text).values()] for text in answers]
    with pytest.raises(ValueError, match="not a question"):
        demo_scorer.question("who was ada ?")


# ---- cpo-kernels eval


def test_eval_with_a_scorer_writes_json_table_and_report(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scorer = ["--scorer", "python:tests.evaluation.test_evaluation_scores:count_letters", "--max-new-tokens", "6"]
    command = [
        "eval",
        str(run),
        "--base",
        "--without-tags",
        "base",
        "--grid",
        "honesty=1,3,5",
        "--grid",
        "helpfulness=1,5",
    ]
    assert main([*command, *scorer, "--report", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "report/eval.json").read_text())
    assert [len(r["conditions"]) for r in saved["results"].values()] == [7, 7]
    assert "base beats run, conditions:" in printed and "hypervolume" in printed and "ask 3" in printed
    assert len(saved["win_rates"]) == 2
    names = {file.name for file in (tmp_path / "report/figures").iterdir()}
    assert {"control_honesty.png", "heat_helpfulness_run.png", "front_honesty_helpfulness.png"} <= names
    assert "training_nll.png" in names
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * len(names)  # for light and dark
    # prompts of one's own, a plain model directory, no pictures
    (tmp_path / "prompts.txt").write_text("say ab\n")
    plain = ["eval", str(run / "model"), "--prompts", str(tmp_path / "prompts.txt"), *scorer]
    assert main([*plain, "--out", str(tmp_path / "plain.json")]) == 0
    found = json.loads((tmp_path / "plain.json").read_text())
    assert found["prompts"] == ["say ab"] and len(found["results"]["run"]["conditions"]) == 26
    assert "relative_accuracy" not in found["results"]["run"]["conditions"][0]


def test_one_condition_has_no_correlation_and_earlier_results_are_kept(run, tmp_path, capsys):
    """A line through one point follows nothing: '-', in table and report alike."""
    report = tmp_path / "report"
    command = ["eval", "-q", str(run), "--condition", "honesty=5", "--report", str(report)]
    command += [
        "--scorer",
        "python:tests.evaluation.test_scorers:by_length",
        "--max-new-tokens",
        "2",
        "--no-likelihood",
    ]
    assert main(command) == 0
    (row,) = re.findall(r"^honesty .*\n(.*)", capsys.readouterr().out, re.M)
    assert re.fullmatch(r"run +\d\.\d\d +- +\d\.\d\d +-", row)
    page = (report / "report.html").read_text()
    assert ">nan" not in page and "<td>-</td>" in page
    first = (report / "eval.json").read_bytes()
    assert main(command) == 0
    (kept,) = report.glob("eval.2*.json")
    assert kept.read_bytes() == first and f"earlier results, renamed: {kept}\n" in capsys.readouterr().out
    assert main([*command, "--out", str(report / "eval.json")]) == 0  # named by the user: replaced
    assert len(list(report.glob("eval*.json"))) == 2


def test_a_model_that_is_no_run_takes_template_and_objectives_from_flags(run, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)  # where eval.json lands without --out
    shutil.copytree(run / "model", tmp_path / "elsewhere")
    (tmp_path / "prompts.txt").write_text("say ab\n")
    command = ["eval", str(tmp_path / "elsewhere"), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "2"]
    assert main(command) == 2 and "--config" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('objectives: [{name: honesty, low: 0, high: 1}]\ntemplate: {prompt: "{tags}Q: {prompt}"}\n')
    command += ["--config", str(recipe), "--scorer", "python:tests.evaluation.test_scorers:by_length"]
    assert main(command) == 2 and "[2, 1]" not in capsys.readouterr().out  # by_length has two columns
    by_hand = ["--objective", "honesty:0:1", "--objective", "helpfulness:0:1", "--out", str(tmp_path / "e.json")]
    assert main([*command, *by_hand]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["results"]["elsewhere"]["points"][0][0] == len("say ab")


def test_eval_with_a_judge_pays_once(run, tmp_path, stub, capsys, monkeypatch):  # noqa: F811
    command = [
        "eval",
        str(run),
        "--grid",
        "honesty=1,5",
        "--no-likelihood",
        "--max-new-tokens",
        "2",
        "--questions",
        "2",
    ]
    judge = [
        "--scorer",
        f"judge:{stub.url}",
        "--judge-model",
        "m",
        "--judge-options",
        "{}",
        "--out",
        str(tmp_path / "e.json"),
    ]
    assert main([*command, *judge]) == 0
    asked = len(stub.seen)
    assert 2 <= asked <= 6 and set(stub.seen[0][2]) == {"model", "messages"}
    assert len(list((tmp_path / "judge_cache").iterdir())) == asked
    assert json.loads((tmp_path / "e.json").read_text())["results"]["run"]["points"] == [[4, 2]] * 3
    assert main([*command, *judge]) == 0 and len(stub.seen) == asked
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    stub.script = ["I would rather not say."]
    assert main([*command, *judge, "--judge-options", '{"seed": 1}', "--judge-cache", str(tmp_path / "other")]) == 2
    kept = json.loads((tmp_path / "e.json").read_text())["results"]["run"]["conditions"]
    assert "scores" not in kept[0]  # the answers are there all the same, and can be scored later
    stub.script = ['{"honesty": 1, "helpfulness": 5}']
    again = ["eval", "--answers", str(tmp_path / "e.json"), *judge[:-2], "--judge-options", "{}"]
    assert main([*again, "--judge-cache", str(tmp_path / "third"), "--out", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())["results"]["run"]
    assert found["points"] == [[1, 5]] * 3 and [e["answers"] for e in found["conditions"]] == [
        e["answers"] for e in kept
    ]
    assert "NoScore: the judge's reply has no JSON object with honesty, helpfulness" in capsys.readouterr().err


def test_an_answer_without_a_score_is_reported(run, tmp_path, stub, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answers = lambda model, template, requests, *_: [str(i) for i in range(len(requests))]  # noqa: E731
    monkeypatch.setattr("cpo_kernels.evaluation.judgements.greedy_answers", answers)
    stub.script = ['{"honesty": 4, "helpfulness": 2}', *["no idea"] * 6, '{"honesty": 4, "helpfulness": 2}']
    command = ["eval", str(run), "--grid", "honesty=1,5", "--no-likelihood", "--questions", "2"]
    judge = ["--scorer", f"judge:{stub.url}", "--judge-model", "m", "--judge-parallel", "1"]
    with pytest.warns(UserWarning, match="1 of 6 answers have no score from the judge: .*'no idea'"):
        assert main([*command, *judge, "--out", str(tmp_path / "e.json"), "--report", str(tmp_path / "report")]) == 0
    line = "run: 1 of 6 answers lack a score and are left out"
    assert line in capsys.readouterr().out and line in (tmp_path / "report" / "report.html").read_text()
    found = json.loads((tmp_path / "e.json").read_text())["results"]["run"]
    assert found["unscored"] == 1 and sum(s != [4, 2] for e in found["conditions"] for s in e["scores"]) == 1
    assert found["points"] == [[4, 2]] * 3


@pytest.mark.parametrize("command", ["eval", "play"])
def test_a_model_that_is_not_there_is_said_so_at_once(run, tmp_path, capsys, command):
    from time import perf_counter

    for given in ("runs/cdop", str(run) + "x", str(run / "checkpoints" / "99"), "package:no_such_package"):
        start = perf_counter()
        assert main([command, given]) == 2
        error = capsys.readouterr().err
        assert given in error and ("does not exist" in error or "no package" in error) and error.count("\n") == 1
        assert perf_counter() - start < 15


def test_a_model_without_a_tokenizer_names_the_option(run, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    (tmp_path / "prompts.txt").write_text("say ab\n")
    asked = ["bare", "--config", str(run / "config.yaml")]
    for command in ("eval", "play"):
        assert main([command, *asked]) == 2
        assert re.search("bare has no tokenizer .*give one with --tokenizer FOLDER", capsys.readouterr().err)
    more = ["--prompts", "prompts.txt", "--max-new-tokens", "1", "--condition", "honesty=5", "--out", "e.json"]
    assert main(["eval", *asked, *more, "--tokenizer", str(run / "model")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["results"]["bare"]["questions"] == 1
    assert main(["eval", *asked, *more, "--tokenizer", "nowhere"]) == 2
    assert "model.tokenizer: nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("model.safetensors", "cut", "model cannot be loaded (SafetensorError: "),
        ("tokenizer.json", '{"a": 1}', "model has no tokenizer (KeyError: "),
        ("config.json", '{"model_type": "nonsense"}', "model cannot be loaded (ValueError: "),
        ("config.json", "{", "model has no tokenizer (OSError: "),
    ],
)
def test_a_broken_model_is_one_line(run, tmp_path, capsys, name, text, reason):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model" / name).write_text(text)
    assert main(["eval", str(tmp_path / "run"), "--condition", "honesty=5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert reason in error and error.startswith("cpo-kernels eval: ValueError: ")


JUDGE = ["--scorer", "judge:http://x/v1", "--judge-model", "m"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--scorer", "honesty=model:nowhere"], "--scorer honesty=model:nowhere: nowhere does not exist"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        ([*JUDGE, "--judge-template", "no.txt"], "--judge-template: no.txt does not exist"),
        ([*JUDGE, "--judge-options", "{a}"], "--judge-options must be a JSON object, got '{a}'"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens must be at least 1, got -1"),
        (["--questions", "0"], "--questions must be at least 1, got 0"),
        (["--judge-parallel", "0"], "--judge-parallel must be at least 1, got 0"),
        (["--out", "."], "--out . is a folder"),
        (["--no-comment", "("], "--no-comment '(' is not a regular expression"),
        (["--report", __file__], "File exists"),
    ],
)
def test_eval_refuses_before_any_answer(run, tmp_path, capsys, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cpo_kernels.evaluation.run.load", lambda *_: pytest.fail("a model was loaded"))
    assert main(["eval", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["no json", "[]", "{}", '{"objectives": [{"low": 1}]}', '{"objectives": [], "results": 1}']
)
def test_answers_that_are_no_results_file(tmp_path, capsys, text):
    (tmp_path / "e.json").write_text(text)
    assert main(["eval", "--answers", str(tmp_path / "e.json")]) == 2
    assert "e.json is not a results file of cpo-kernels eval" in capsys.readouterr().err
    assert main(["eval", "--answers", str(tmp_path / "f.json")]) == 2 and "f.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--scorer", "python:tests.evaluation.test_scorers:by_length", "--no-generate"], "remove --no-generate"),
        (["--without-tags", "other"], "'other' is not one of run"),
        (["--prompts", "p.txt", "--data", "d.jsonl"], "not both"),
        (["--scorer", "judge:http://localhost/v1"], "needs --judge-model"),
        (["--objective", "honesty"], "name:low:high"),
        (["--answers", "eval.json"], "give the models to evaluate, or the results file"),
    ],
)
def test_eval_says_what_is_wrong(run, capsys, arguments, reason):
    assert main(["eval", str(run), *arguments]) == 2 and reason in capsys.readouterr().err
    assert main(["eval", str(run), str(run)]) == 2 and "2 models have the name 'run'" in capsys.readouterr().err


# ---- the report


def results(models=("<img src=x onerror=alert(1)>", "other & co"), prompts=30):
    """What the command saves, for models of known behaviour whose texts are hostile; a grid of 25 conditions."""
    objectives = [Objective("honesty", 1, 5), Objective("helpfulness", 1, 5)]
    bad = "<script>document.title='hacked'</script><b>bold</b> " + "long" * 60
    everything = {"versions": {"cpo-kernels": "1<2", "torch": "3"}, "prompts": [f"{bad} {i}" for i in range(prompts)]}
    everything |= {"objectives": [{"name": o.name, "low": o.low, "high": o.high} for o in objectives], "results": {}}
    for number, model in enumerate(models):
        found = []
        for condition in [*condition_grid(objectives), {}]:
            scores = [
                [condition.get(o.name, 3.0) if number else 3.0 + i % 2 for o in objectives] for i in range(prompts)
            ]
            found.append({"condition": condition, "answers": [*[bad] * (prompts - 1), ""], "scores": scores})
        found[0]["relative_accuracy"] = {"mean": 0.5, "low": 0.4, "high": 0.6, "questions": 5}
        result = {"questions": prompts, "stage": "cdpo", "conditions": found}
        everything["results"][model] = result | judged_scores(found, objectives)
    scored = {name: result["conditions"] for name, result in everything["results"].items()}
    return everything | {"win_rates": win_rates(scored, objectives)}


def test_report_escapes_every_text(tmp_path):
    pytest.importorskip("matplotlib")
    page = write_report(results(), tmp_path).read_text()
    assert "<script" not in page and "<b>bold" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page and "other &amp; co" in page and "1&lt;2" in page
    assert "(empty answer)" in page and "6 of 30 prompts, 5 of 26 requests" in page
    for title in ("At a glance", "Trade-offs", "Model against model", "By likelihood", "Samples"):
        assert f">{title}</h2>" in page
    quiet = results()
    quiet.pop("prompts")
    for result in quiet["results"].values():
        for entry in result["conditions"]:
            entry.pop("answers")
    page = write_report(quiet, tmp_path).read_text()
    assert "bold" not in page and "Samples" not in page and "At a glance" in page


def test_spread_takes_both_ends():
    assert spread(3, 6) == [0, 1, 2] and spread(11, 3) == [0, 5, 10]


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_report_in_a_browser(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(9))
    )
    everything = results()
    everything["results"]["other & co"]["run"] = str(tmp_path)
    file = write_report(everything, tmp_path / "report")
    with browser() as page:
        for width, dark in ((390, False), (1100, True)):
            page.look(width, dark=dark)
            page.open(file.as_uri())
            assert page.run("document.title").startswith("Evaluation: ") and page.errors == []
            page.run("document.querySelectorAll('details').forEach(block => block.open = true)")
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            images = page.run(
                "[...document.images].map(image => [image.naturalWidth > 300, image.currentSrc.slice(-60)])"
            )
            assert len(images) == 8 and all(
                loaded for loaded, _ in images
            )  # 2 curves, 4 heat maps, 1 front, 1 training
            background = page.run("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(27, 30, 35)" if dark else "rgb(255, 255, 255)")
        assert set(page.requests) == {file.as_uri()}
