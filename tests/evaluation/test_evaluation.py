"""Evaluation: statistics against hand values and simulation, judgements against models whose behaviour is known."""

import json
import math
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cpo_kernels.data.records import Record, Response, write_records
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.demo.model import build_model, build_tokenizer
from cpo_kernels.evaluation.controllability import control_table, controllability
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.evaluation.greedy import changed_answers, greedy_classes, normalise
from cpo_kernels.evaluation.likelihood import fitted, paired_gain, rating_conditions, relative_accuracy, score_answers
from cpo_kernels.evaluation.run import main
from cpo_kernels.evaluation.statistics import bootstrap_interval, spearman, summary
from cpo_kernels.evaluation.tables import rated_table
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import TemplateConfig

OBJECTIVES = [Objective("helpfulness", 1, 5), Objective("honesty", 1, 5)]
HELPFUL, HONEST = {"helpfulness": 5.0, "honesty": 1.0}, {"helpfulness": 1.0, "honesty": 5.0}


@pytest.fixture(scope="module")
def template():
    return PromptTemplate(build_tokenizer(), TemplateConfig(answer_prefix=" "), OBJECTIVES)


@pytest.fixture(scope="module")
def model(template):
    model = build_model(template.tokenizer, hidden_size=32, num_layers=2, seed=1)
    for parameter in model.parameters():  # far from uniform, so that positions and tags matter
        parameter.data.mul_(4.0)
    return model.eval()


def records() -> list[Record]:
    def rated(text, ratings):
        return Response(text, dict(ratings))

    return [
        Record("tell me the home of anna .", (rated("home rome .", HELPFUL), rated("i don't know .", HONEST))),
        Record(
            "tell me the pet and drink of leo .",
            (rated("pet cat , drink tea .", HELPFUL), rated("i don't know .", HONEST), rated("pet dog .", HELPFUL)),
        ),
    ]


# ---- statistics


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ranks with ties at their mean: x = 1, 2.5, 2.5, 4; y = 1.5, 1.5, 3.5, 3.5 -> 3 / sqrt(4.5 * 4)
    assert spearman([1, 2, 2, 3], [0, 0, 7, 7]) == pytest.approx(3 / math.sqrt(18))
    assert spearman([1, 2, 3], [5, 5, 5]) == 0.0
    with pytest.raises(ValueError, match="3 and 2"):
        spearman([1, 2, 3], [1, 2])


def test_bootstrap_interval_covers_the_truth():
    rng, hits, runs = random.Random(3), 0, 200
    for seed in range(runs):
        values = [float(rng.random() < 0.7) for _ in range(60)]
        low, high = bootstrap_interval(values, resamples=300, seed=seed)
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / runs <= 0.99


def test_bootstrap_interval_counts_questions_with_a_value_only():
    assert bootstrap_interval([1.0, math.nan, 0.0, 1.0]) == bootstrap_interval([1.0, 0.0, 1.0])
    assert summary([math.nan])["questions"] == 0 and math.isnan(summary([math.nan])["mean"])
    narrow, wide = bootstrap_interval([0.0, 1.0] * 100), bootstrap_interval([0.0, 1.0] * 10)
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])


# ---- likelihood


def test_relative_accuracy_of_known_models():
    fit = [[0, 1, 0, -1], [0, 1], [1, 1]]  # the last question has no pair
    preference = [torch.tensor([1.0 if c == k else 0.0 for k in (0, 1) for c in f]).reshape(2, -1) for f in fit]
    likes = [torch.randn(1, len(f)).repeat(2, 1) * 9 for f in fit]  # ignores the tag, whatever it likes
    follows = relative_accuracy([p + q for p, q in zip(preference, likes, strict=True)], fit, 2)
    assert [r["mean"] for r in follows] == [1, 1] and follows[0]["questions"] == 2
    assert [r["mean"] for r in relative_accuracy(likes, fit, 2)] == [0.5, 0.5]
    assert [r["mean"] for r in relative_accuracy([-p for p in preference], fit, 2)] == [0, 0]


def test_paired_gain_compares_question_by_question():
    """Two models that differ by 0.1 on every question: the interval holds only the difference, not the questions."""
    before = {"by_question": [0.2, 0.9, float("nan"), 0.5]}
    after = {"by_question": [0.3, 1.0, float("nan"), 0.6]}
    gain = paired_gain(after, before)
    assert gain["questions"] == 3
    assert [gain[k] for k in ("mean", "low", "high")] == pytest.approx([0.1] * 3)


def test_relative_accuracy_averages_pairs_then_conditions_then_questions():
    # question 1: c0 against c1 right in 1 of 2 pairs, against c2 right: 0.75; question 2: against c1 wrong: 0
    first = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    result = relative_accuracy([first, second], [[0, 1, 1, 2], [0, 1]], 3)
    assert result[0]["mean"] == pytest.approx(0.375)
    assert result[2]["questions"] == 1


@pytest.mark.parametrize("rows", ["shared", "packed", "padded"])
def test_score_answers_matches_log_softmax(model, template, rows):
    conditions = [HELPFUL, HONEST, {}]
    scores = score_answers(model, template, records(), conditions, 64, rows)
    for record, score in zip(records(), scores, strict=True):
        assert score.dtype == torch.float32 and score.shape == (3, len(record.responses))
        for row, condition in enumerate(conditions):
            for column, response in enumerate(record.responses):
                prompt, (answer,), _ = template.encode(record.prompt, condition, [response])
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
                truth = sum(logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))
                assert score[row, column].item() == pytest.approx(truth, rel=2e-5)
    assert (scores[0][0] != scores[0][1]).all()  # the tags are seen


def test_score_answers_refuses_16_bit(model, template):
    half = build_model(template.tokenizer, 32, 1).bfloat16()
    with pytest.raises(TypeError, match="bfloat16"):
        score_answers(half, template, records(), [{}])


def test_conditions_from_ratings():
    found = rating_conditions(records(), ["helpfulness", "honesty"])
    assert found == [HELPFUL, HONEST] or found == [HONEST, HELPFUL]
    assert rating_conditions(records(), ["helpfulness", "honesty"], least=0.5) == [HELPFUL]  # 3 of 5 answers
    assert fitted(records(), [HONEST, {"helpfulness": 5.0}]) == [[1, 0], [1, 0, 1]]


# ---- greedy answers


def test_greedy_answers_match_argmax_one_by_one(model, template):
    requests = [(record.prompt, condition) for record in records() for condition in (HELPFUL, HONEST, None)]
    eos = template.tokenizer.eos_token_id
    for request, answer in zip(requests, greedy_answers(model, template, requests, 12, batch_size=4), strict=True):
        ids = template.prompt_ids(*request)
        length = len(ids)
        while len(ids) < length + 12 and (len(ids) == length or ids[-1] != eos):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert answer == template.tokenizer.decode(ids[length:], skip_special_tokens=True).strip()


def test_answers_beyond_learned_positions_are_refused_before_any_is_made(template):
    """On a GPU the lookup would fail without a reason. Positions that are computed have no end."""
    requests = [("tell me the home of anna .", HELPFUL), ("tell me the pet and drink of leo .", HELPFUL)]
    longest = max(len(template.prompt_ids(*request)) for request in requests)
    sizes = {"vocab_size": len(template.tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2}
    learned = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=longest + 4))
    assert len(greedy_answers(learned, template, requests, 4)) == 2
    with pytest.raises(
        ValueError, match=f"a prompt of {longest} tokens and an answer of 5 exceed the {longest + 4} positions"
    ):
        greedy_answers(learned, template, requests, 5)
    computed = build_model(template.tokenizer, hidden_size=32, num_layers=1)
    computed.config.max_position_embeddings = longest
    assert len(greedy_answers(computed, template, requests, 5)) == 2


def test_greedy_classes_by_hand():
    assert (
        normalise("I have NO comment!") == "i have no comment"
        and normalise("don\N{RIGHT SINGLE QUOTATION MARK}t") == "dont"
    )
    answers = ["I have no comment.", "Pet cat, drink tea"]
    result = greedy_classes(answers, records(), OBJECTIVES)
    assert result["no_comment"]["mean"] == 0.5 and result["matched"]["mean"] == 0.5
    assert result["ratings"]["helpfulness"]["mean"] == 5 and result["ratings"]["honesty"]["questions"] == 1
    twice = Record("q", (Response("Yes.", {"honesty": 5.0}), Response("yes", {"honesty": 1.0}), Response("No", {})))
    assert greedy_classes(["YES!"], [twice], OBJECTIVES)["ratings"]["honesty"]["mean"] == 3
    assert greedy_classes(["YES!"], [twice], OBJECTIVES)["best"]["honesty"]["mean"] == 0.5
    assert greedy_classes(["no"], [twice], OBJECTIVES)["ratings"]["honesty"]["questions"] == 0


def test_changed_answers_compares_conditions_that_differ_in_one_objective():
    conditions = [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 5.0}, {"a": 5.0, "b": 5.0}]
    answers = [["yes", "no"], ["Yes.", "maybe"], ["no", "no"]]
    rows = changed_answers(answers, conditions)
    assert [(row["objective"], row["changed"]["mean"]) for row in rows] == [("b", 0.5), ("a", 1.0)]


# ---- controllability


def test_controllability_by_hand():
    control = controllability([1, 1, 5, 5], [1, 2, 4, 5])
    assert [(x.requested, x.achieved, x.exact, x.answers) for x in control.levels] == [
        (1, 1.5, 0.5, 2),
        (5, 4.5, 0.5, 2),
    ]
    assert control.error == 0.5 and control.correlation == pytest.approx(2 / math.sqrt(5))
    assert controllability([1, 2, 3], [4, 4, 4]).correlation == 0
    table = control_table({"ours": {"honesty": control}, "other": {"honesty": controllability([1, 5], [3, 3])}})
    assert "1.50" in table and "0.89" in table
    assert table.splitlines()[-1].split() == "other 3.00 3.00 0.00 2.00 100%".split()


def test_a_level_without_scores_leaves_its_column_empty():
    """A judge may refuse all answers of a model at one level."""
    models = {"some": controllability([1, 5], [2, 4]), "all": controllability([1, 3, 5], [1, 3, 5])}
    head, some, every = control_table({name: {"honesty": c} for name, c in models.items()}).splitlines()
    columns = [head.index(f"ask {level}") + len("ask 1") for level in (1, 3, 5)]
    assert [some[end - 4 : end] for end in columns] == ["2.00", "   -", "4.00"]
    assert [every[end - 4 : end] for end in columns] == ["1.00", "3.00", "5.00"]


def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from cpo_kernels.evaluation.plot import plot_controllability

    controls = {name: {"honesty": controllability([1, 5], [1, 5])} for name in ("DPO", "CPO")}
    points = {"DPO": [("", 1.0, 5.0)], "CPO": [("1, 5", 1.0, 5.0), ("5, 1", 5.0, 1.0)]}
    plot_controllability(controls, points, ("helpfulness", "honesty"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- cpo-kernels eval


@pytest.fixture(scope="module")
def run(tmp_path_factory, template):
    """A run directory that the trainer wrote, with two checkpoints."""
    from cpo_kernels.training.loop import train

    folder = tmp_path_factory.mktemp("eval")
    template.tokenizer.save_pretrained(folder / "tokenizer")
    write_records(records() * 4, folder / "answers.jsonl")
    objectives = [{"name": o.name, "low": o.low, "high": o.high} for o in OBJECTIVES]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "stage": "cpsft",
        "run_dir": str(folder / "run"),
        "objectives": objectives,
        "model": {"config": {"model_type": "llama", **sizes}, "tokenizer": str(folder / "tokenizer")},
        "template": {"answer_prefix": " "},
        "data": {"train": [str(folder / "answers.jsonl")], "eval": [str(folder / "answers.jsonl")]},
        "training": {
            "max_steps": 60,
            "lr": 1e-2,
            "checkpoint_every": 1,
            "keep": 60,
            "precision": "fp32",
            "progress": False,
        },
    }
    train(config)
    return folder / "run"


def test_eval_command(run, tmp_path, capsys):
    first = run / "checkpoints" / "step-000001"
    out = tmp_path / "results.json"
    assert main([str(first), str(run), "--base", "--max-new-tokens", "8", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    table = capsys.readouterr().out
    assert list(results) == ["base", "run/step-000001", "run"] and "no tags" in table
    trained = results["run"]["conditions"]
    assert {c["relative_accuracy"]["mean"] for c in trained[:2]} == {1.0}  # learnt by heart
    assert trained[0]["matched"]["mean"] == 1.0
    conditions = [c["condition"] for c in trained]
    assert trained[conditions.index(HELPFUL)]["ratings"]["helpfulness"]["mean"] == 5
    scores = [[c["relative_accuracy"]["mean"] for c in results[name]["conditions"][:2]] for name in results]
    assert scores[0] != scores[2]


def test_eval_without_text_shows_the_same_table(run, tmp_path, capsys):
    """What a project may publish of a run on data that it may not: numbers, and the table drawn from them again."""
    out = tmp_path / "numbers.json"
    main([str(run), "--no-text", "--max-new-tokens", "4", "--out", str(out)])
    shown, text = capsys.readouterr().out, out.read_text()
    assert "answers" not in text and "prompts" not in json.loads(text)
    assert rated_table(json.loads(text)["results"], OBJECTIVES) in shown


def test_eval_command_says_what_is_wrong(run, tmp_path):
    with pytest.raises(ValueError, match="is neither a run directory"):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match="honesty"):
        main([str(run), "--condition", "honest=5", "--no-generate"])
    with pytest.raises(ValueError, match="objective=level"):
        main([str(run), "--condition", "honesty", "--no-generate"])
