"""`RatedData`: rows for TRL are what a recipe trains on, and the trained model is used like a recipe's."""

import json
import math
import warnings

import pytest
import torch
import transformers

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl import SFTConfig  # noqa: E402

from cpo_kernels.data.preparation import draws_of, load_data  # noqa: E402
from cpo_kernels.data.records import Record, Response, write_records  # noqa: E402
from cpo_kernels.data.template import PromptTemplate  # noqa: E402
from cpo_kernels.evaluation.loading import find_model, load  # noqa: E402
from cpo_kernels.evaluation.run import main as evaluate  # noqa: E402
from cpo_kernels.integrations import FusedDPOConfig, FusedDPOTrainer, FusedSFTTrainer, RatedData  # noqa: E402
from cpo_kernels.objectives import Objective, value_gap  # noqa: E402
from cpo_kernels.play.server import Player  # noqa: E402
from cpo_kernels.recipe.config import read_config  # noqa: E402
from cpo_kernels.training.loop import train  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.tiny import one_thread  # noqa: E402, F401
from tests.support.tokenizers_at_odds import CHATML, GEMMA, byte_level, legacy  # noqa: E402
from tests.support.trl_runs import SETTINGS, lora, make, quiet  # noqa: E402, F401

OBJECTIVES = [Objective("honesty", 1, 5), Objective("helpfulness", 1, 5, weight=2.0)]
RECIPE = [{"name": "honesty", "low": 1, "high": 5}, {"name": "helpfulness", "low": 1, "high": 5, "weight": 2.0}]
MIXTURE = [{"sampler": "attained", "share": 0.5}, {"sampler": "best", "share": 0.2}, {"sampler": "grid", "share": 0.3}]
CONDITIONS = {"mixture": MIXTURE, "per_prompt": 2, "pairs": 3}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
NO_END = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def ratings(honesty=None, helpfulness=None):
    given = {"honesty": honesty, "helpfulness": helpfulness}
    return {name: float(level) for name, level in given.items() if level is not None}


ANSWERS = (
    Response("Yes", ratings(5, 1)), Response("No", ratings(1, 5)), Response("blue", ratings(3)),
    Response("green", ratings(None, 4)), Response("", {}),
)  # fmt: skip
TEXTS = [Record(f"Sky {x}?", ANSWERS) for x in "ABCDEF"]
TURNS = (("system", "Be kind."), ("user", "Sky?"), ("assistant", "blue"), ("user", "And now?"))
TALKS = [Record(TURNS, ANSWERS), Record(TURNS[:2], ANSWERS[:3]), Record("Sky?", ANSWERS[::-1])]


def rows_of(records):
    """As a data set of layout records holds them."""
    rows = []
    for record in records:
        prompt = record.prompt
        if isinstance(prompt, tuple) or records is TALKS:
            turns = [("user", prompt)] if isinstance(prompt, str) else prompt
            prompt = [{"role": role, "content": text} for role, text in turns]
        rows.append({"prompt": prompt, "responses": [{"text": r.text, "ratings": r.ratings} for r in record.responses]})
    return rows


def dataset(records=TEXTS):
    """A table: what is not rated is null there."""
    return datasets.Dataset.from_list(rows_of(records))


def groups_of(stage, records, template, conditions, folder, seed=0, tokenizer=None):
    """What the recipe of the same keys draws from the same data in a file, and its template."""
    write_records(records, folder / "rows.jsonl")
    keys = {"stage": stage, "seed": seed, "objectives": RECIPE, "template": template, "conditions": conditions}
    config = read_config(keys | {"data": {"train": [str(folder / "rows.jsonl")], "eval_share": 0.0}})
    found, _, objectives = load_data(config, None, None, {})
    draws = draws_of(config, found, objectives)
    return [g for unit in draws.units for g in unit], PromptTemplate(tokenizer, config.template, objectives), draws


TEMPLATES = [
    ({"prompt": "{tags}Q: {prompt}\nA:", "answer_prefix": " "}, None, TEXTS),
    ({"prompt": "chat"}, CHATML, TEXTS),
    ({"prompt": "chat", "system": "Be brief.", "tags": "< {name}: {value} > "}, CHATML, TALKS),
    ({"prompt": "chat"}, NO_END, TALKS),
]


@pytest.mark.parametrize("template, source, records", TEMPLATES, ids=["text", "chatml", "conversation", "no end token"])
@pytest.mark.parametrize("make_tokenizer", [byte_level, legacy])
def test_rows_are_what_a_recipe_trains_on(tmp_path, make_tokenizer, template, source, records):
    """Texts, tokens with the end of the turn, conditions and ratings of both stages, from the same seed."""
    tokenizer = make_tokenizer(source, begins=source is None)
    data = RatedData(dataset(records), tokenizer, OBJECTIVES, template=template, seed=3)
    assert data.records == records
    rows = data.cpsft({"mixture": MIXTURE})
    groups, prompts, draws = groups_of("cpsft", records, template, {"mixture": MIXTURE}, tmp_path, 3, tokenizer)
    assert len(rows) == len(groups) == sum(bool(r.ratings) for record in records for r in record.responses)
    for row, group in zip(rows, groups, strict=True):
        prompt, (response,), _ = prompts.encode(group.prompt, group.tags, group.responses)
        assert row["input_ids"] == [*prompt, *response]
        assert row["completion_mask"] == [0] * len(prompt) + [1] * len(response)
        assert response[-1] == prompts.end_id and group.condition == group.responses[0].ratings
        if make_tokenizer is byte_level:
            begin = "<s>" if source is None else ""
            end = tokenizer.decode([prompts.end_id])
            assert row["prompt"] == begin + prompts.text(group.prompt, group.tags)
            text = prompts.config.answer_prefix + group.responses[0].text
            assert row["completion"].removesuffix(end).rstrip("\n") == text

    rows = data.cdpo(CONDITIONS)
    groups, prompts, draws = groups_of("cdpo", records, template, CONDITIONS, tmp_path, 3, tokenizer)
    assert {name: data.report[name] for name in draws.counts} == draws.counts
    pairs = [(group, *pair) for group in groups for pair in group.pairs]
    assert len(rows) == len(pairs) == draws.counts["pairs"]
    swapped = 0
    for row, (group, a, b) in zip(rows, pairs, strict=True):
        prompt, responses, _ = prompts.encode(group.prompt, group.tags, group.responses)
        levels = [[r.ratings.get(o.name) for o in OBJECTIVES] for r in group.responses]
        condition = [group.condition.get(o.name) for o in OBJECTIVES]
        nan = [[math.nan if x is None else x for x in part] for part in (levels[a], levels[b], condition)]
        chosen, rejected = (a, b) if value_gap(*nan, OBJECTIVES) > 0 else (b, a)
        swapped += chosen == b
        assert (row["chosen_scores"], row["rejected_scores"]) == (levels[chosen], levels[rejected])
        assert row["condition"] == condition and row["prompt_ids"] == list(prompt)
        assert row["objectives"] == [o.name for o in OBJECTIVES]
        assert (row["chosen_ids"], row["rejected_ids"]) == (list(responses[chosen]), list(responses[rejected]))
    assert 0 < swapped < len(rows)
    again = RatedData(dataset(records), tokenizer, OBJECTIVES, template=template, seed=4).cdpo(CONDITIONS)
    assert again["condition"] != rows["condition"]


def sft(data, folder, model=None, **options):
    args = SFTConfig(str(folder), **(SETTINGS | options))
    rows = data.cpsft({"mixture": MIXTURE})
    return FusedSFTTrainer(model or small(data), args, train_dataset=rows, processing_class=data.template.tokenizer)


def dpo(data, folder, model, ref_model=None, conditions=CONDITIONS, peft_config=None, **options):
    args = FusedDPOConfig(str(folder), objectives=OBJECTIVES, **(SETTINGS | options))
    rows = {"train_dataset": data.cdpo(conditions), "processing_class": data.template.tokenizer}
    return FusedDPOTrainer(model, ref_model, args, **rows, peft_config=peft_config)


def small(data, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(data.template.tokenizer), **sizes))


@pytest.mark.parametrize("source", [CHATML, GEMMA, NO_END, None], ids=["chatml", "gemma", "no end token", "text"])
def test_trl_trains_on_these_tokens(tmp_path, source):
    """Of a trainer's batches: prompts are masked, an answer ends with its end token and nothing follows."""
    tokenizer = byte_level(source, begins=source is None, ends=source is None)
    data = RatedData(
        dataset(), tokenizer, OBJECTIVES, template={"prompt": "chat"} if source else {"answer_prefix": " "}
    )
    rows = data.cpsft({"mixture": MIXTURE})
    trainer = sft(data, tmp_path / "sft", shuffle_dataset=False)
    for row, batch in zip(rows, trainer.train_dataset, strict=True):
        assert batch["input_ids"] == row["input_ids"]
        start = row["completion_mask"].index(1)
        assert batch["labels"] == [-100] * start + row["input_ids"][start:]
        assert batch["labels"][-1] == data.template.end_id
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][batch["labels"] != -100].tolist()
    assert labels.count(data.template.end_id) == SETTINGS["per_device_train_batch_size"]
    data.save(trainer, tmp_path / "stage one")

    trainer = dpo(data, tmp_path / "dpo", str(tmp_path / "stage one" / "model"))
    rows = data.cdpo(CONDITIONS)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[name] == rows[name]
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["scores"].shape == (4, 2) and batch["conditions"].shape == (2, 2)


def test_trl_s_own_encoding_of_plain_texts_is_the_same(tmp_path):
    """Without the columns of tokens TRL encodes the texts itself; a plain text comes out as the recipe encodes it."""
    data = RatedData(dataset(), tiny.tokenizer(), OBJECTIVES, template={"answer_prefix": " "})
    rows = data.cdpo(CONDITIONS)
    texts = rows.remove_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    args = FusedDPOConfig(str(tmp_path), objectives=OBJECTIVES, **SETTINGS)
    models = {"model": small(data), "ref_model": small(data)}
    trainer = FusedDPOTrainer(**models, args=args, train_dataset=texts, processing_class=data.template.tokenizer)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[name] == rows[name]


@pytest.mark.parametrize("stage", ["cpsft", "cdpo"])
def test_a_step_is_that_of_a_recipe(tmp_path, stage):
    """All rows in one batch: the losses of three steps are those of the same recipe."""
    data = RatedData(dataset(), tiny.tokenizer(), OBJECTIVES)
    conditions = {"mixture": MIXTURE} if stage == "cpsft" else {**CONDITIONS, "pairs": None}
    model = small(data)
    model.save_pretrained(tmp_path / "model")
    training = {"lr": 3e-3, "schedule": "constant", "warmup": 0, "batch_size": 100, "max_steps": 3, "precision": "fp32"}
    recipe = {"stage": stage, "objectives": RECIPE, "conditions": conditions, "data": {"eval_share": 0.0}}
    recipe |= {"training": {**training, "progress": False}}
    wanted = train(recipe, model=small(data), tokenizer=data.template.tokenizer, records=TEXTS).metrics
    options = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 500}
    options |= {"optim": "adamw_torch", "adam_epsilon": 1e-8}
    if stage == "cpsft":
        trainer = sft(data, tmp_path, small(data), **options)
    else:
        trainer = dpo(data, tmp_path, str(tmp_path / "model"), conditions=conditions, **options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx([row["loss"] for row in wanted], rel=2e-3) and losses[2] < 0.97 * losses[0]
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert norms[0] == pytest.approx(wanted[0]["grad_norm"], rel=1e-3)


# ---------------------------------------------------------------- the trained model


@pytest.mark.parametrize("template", [{"prompt": "chat"}, {"prompt": "{tags}Q: {prompt}\nA:", "answer_prefix": " "}])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_saved_model_is_used_like_a_recipe_s(tmp_path, template, adapters):
    """`from_pretrained` and the chat template with levels, the page, and `cpo-kernels eval`."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = PLAIN
    data = RatedData(tiny_rows(), tokenizer, OBJECTIVES, template=template)
    trainer = sft(data, tmp_path / "cpsft")
    trainer.train()
    assert data.save(trainer) == tmp_path / "cpsft"
    assert tokenizer.chat_template == PLAIN  # the caller's is left alone
    stage_one = str(tmp_path / "cpsft" / "model")
    trainer = dpo(data, tmp_path / "out", stage_one, peft_config=lora() if adapters else None)
    trainer.train()
    run = data.save(trainer, tmp_path / "cdpo")

    turn, asked = [{"role": "user", "content": "say ab"}], {"honesty": 5, "helpfulness": 2}
    saved = transformers.AutoTokenizer.from_pretrained(run / "model")
    ids = saved.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, **asked)["input_ids"]
    assert ids == data.template.prompt_ids("say ab", asked) and "<honesty: 5> <helpfulness: 2> " in saved.decode(ids)
    model, found = load(find_model(str(run)))
    assert Player("x", model, found, 4).generate("", "say ab", asked, 4)["read"] == data.template.text("say ab", asked)
    trained = trainer.model.eval()
    with torch.no_grad():
        logits = [m(torch.tensor([ids])).logits for m in (trained, model)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    ends = again.generation_config.eos_token_id
    assert data.template.end_id in (ends if isinstance(ends, list) else [ends])
    (tmp_path / "prompts.txt").write_text("say ab\nsay cd\n")
    given = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--condition",
        "honesty=5,helpfulness=1",
        "--max-new-tokens",
        "4",
    ]
    assert evaluate([str(run), *given]) == 0
    answers = json.loads((run / "eval.json").read_text())
    assert answers
    config = read_config(run / "config.yaml")
    assert config.stage == "cdpo" and config.conditions.per_prompt == 2 and config.template.prompt == template["prompt"]


def tiny_rows():
    return datasets.Dataset.from_list(rows_of(tiny.records()))


# ---------------------------------------------------------------- forms of data


def pairs_of(records):
    """As `FusedDPOTrainer` takes them: a row per pair, ratings in the order of the objectives."""
    rows = []
    for record in records:
        for a, b in ((0, 1), (1, 2), (3, 0)):
            chosen, rejected = record.responses[a], record.responses[b]
            scores = {
                f"{side}_scores": [r.ratings.get(o.name) for o in OBJECTIVES]
                for side, r in (("chosen", chosen), ("rejected", rejected))
            }
            rows.append({"prompt": record.prompt, "chosen": chosen.text, "rejected": rejected.text} | scores)
    return rows


def test_the_layouts_are_seen_by_their_columns():
    """The same records in every form; a response of several pairs is one response."""
    want = [Record(record.prompt, record.responses[:4]) for record in TEXTS]
    answers = [
        {"prompt": record.prompt, "response": r.text, "ratings": r.ratings} for record in want for r in record.responses
    ]
    talk = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs_of(TEXTS)]
    for row in talk:
        row |= {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in talk]
    scores = [{name: row[name] for name in ("chosen_scores", "rejected_scores")} for row in talk]
    implicit = [row | more for row, more in zip(implicit, scores, strict=True)]
    tokenizer = byte_level(CHATML)
    for form in (rows_of(want), answers, pairs_of(TEXTS), talk, implicit):
        for table in (form, datasets.Dataset.from_list(form), datasets.Dataset.from_list(form).to_iterable_dataset()):
            data = RatedData(table, tokenizer, OBJECTIVES)
            assert data.records == want
            assert data.template.chat == (form in (talk, implicit))
    torched = datasets.Dataset.from_list(pairs_of(TEXTS)).with_format("torch")
    assert RatedData(torched, tokenizer, OBJECTIVES).records == want
    pairs = [{"prompt": f"{x}?", "chosen": "Yes", "rejected": "No"} for x in "AB"]
    data = RatedData(datasets.Dataset.from_list(pairs), tokenizer, OBJECTIVES[:1])
    assert [r.ratings for r in data.records[1].responses] == [{"honesty": 5}, {"honesty": 1}]
    named = [{"question": "A?", "answer": "Yes", "truth": 4}, {"question": "A?", "answer": "No", "truth": None}]
    fields = {"prompt": "question", "response": "answer", "ratings": {"honesty": "truth"}}
    data = RatedData(datasets.Dataset.from_list(named), tokenizer, OBJECTIVES[:1], layout="answers", fields=fields)
    assert data.records == [Record("A?", (Response("Yes", {"honesty": 4.0}), Response("No")))]


def test_objectives_may_be_dicts_and_one_config_serves_both():
    data = RatedData(dataset(), tiny.tokenizer(), RECIPE)
    assert data.objectives == OBJECTIVES
    assert len(data.cdpo()) > 0 and data.report["ties"] >= 0


def test_what_does_not_fit_is_named():
    long = [*TEXTS, Record("x" * 200, ANSWERS), Record("Say it", (Response("y" * 300, ratings(5)), *ANSWERS))]
    data = RatedData(dataset(long), tiny.tokenizer(), OBJECTIVES, max_prompt_tokens=100, max_tokens=150)
    with pytest.warns(UserWarning, match="prompts left out: max_prompt_tokens 100, max_tokens 150"):
        rows = data.cpsft({"strip_best": 0})
    assert max(map(len, rows["input_ids"])) == 150 and data.report["cut_responses"] == 1
    noted = [{**row, "context": "It is night."} for row in rows_of(TEXTS)]
    with pytest.warns(UserWarning, match="column 'context' of 6 rows is not read"):
        RatedData(datasets.Dataset.from_list(noted), tiny.tokenizer(), OBJECTIVES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RatedData(dataset(), tiny.tokenizer(), OBJECTIVES).cpsft()


def first_response(row):
    return row["responses"][0]


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda row: row.pop("responses"), "no field 'responses'"),
        (lambda row: row.update(responses=[]), r"field 'responses' must be a list of objects, got \[\]"),
        (lambda row: row.update(prompt=" "), "field 'prompt' is empty"),
        (lambda row: row.update(prompt=[{"role": "user"}]), "field 'prompt': write {role: system | user"),
        (lambda row: first_response(row).update(text=None), "field 'text' must be a string, got None"),
        (lambda row: first_response(row)["ratings"].update(honesty=7), r"rating 7 of honesty is outside \[1, 5\]"),
        (lambda row: first_response(row)["ratings"].update(honesty="good"), "rating 'good' is not a number"),
        (lambda row: first_response(row).update(ratings=[5, 1]), "`ratings` must be a dict of numbers"),
    ],
)
def test_a_wrong_row_of_responses_is_named(change, match):
    rows = json.loads(json.dumps(rows_of(TEXTS)))
    change(rows[2])
    with pytest.raises(ValueError, match=f"the dataset, row 2: {match}"):
        RatedData(rows, tiny.tokenizer(), OBJECTIVES)


@pytest.mark.parametrize(
    "columns, match",
    [
        (
            {"chosen_scores": [5]},
            r"field 'chosen_scores' must hold one number .* for each of honesty, helpfulness, got",
        ),
        ({"chosen_scores": 5}, "field 'chosen_scores' must hold one number .*, got 5"),
        ({"chosen_scores": None}, "field 'chosen_scores' must hold one number .*, got None"),
        ({"rejected_scores": [0, 5]}, r"rating 0 of honesty is outside \[1, 5\]"),
        ({"rejected_scores": [True, 5]}, "rating True is not a number"),
        ({"chosen": None}, "field 'chosen' must be a string, got None"),
        ({"condition": [5, None]}, r"field 'condition' is \[5, None\], so the prompt has its tags already"),
        ({"condition": 5}, "field 'condition' is 5, so the prompt has its tags already"),
    ],
)
def test_a_wrong_pair_is_named(columns, match):
    rows = pairs_of(TEXTS)
    rows[7] |= columns
    with pytest.raises(ValueError, match=f"the dataset, row 7: {match}"):
        RatedData(rows, tiny.tokenizer(), OBJECTIVES)


@pytest.mark.parametrize(
    "rows, match",
    [
        ([], "the dataset is empty"),
        ([{"question": "A?", "answer": "b"}], "has the columns question, answer, but none of responses, response, cho"),
        (datasets.DatasetDict({"train": dataset()}), "row 0 is 'train', not an object of columns: give one split"),
    ],
)
def test_what_is_no_data_set_of_responses_is_refused(rows, match):
    with pytest.raises(ValueError, match=match):
        RatedData(rows, tiny.tokenizer(), OBJECTIVES)


def test_a_condition_that_asks_for_nothing_is_no_condition():
    rows = [{**row, "condition": [None, None]} for row in pairs_of(TEXTS)]
    assert len(RatedData(rows, tiny.tokenizer(), OBJECTIVES).records) == 6


@pytest.mark.parametrize(
    "options, match",
    [
        ({"objectives": []}, "objectives is empty"),
        ({"objectives": ["honesty"]}, "must be a list of Objectives or of dicts of their fields, got"),
        ({"objectives": [Objective("honsty", 1, 5)]}, "no rating of 'honsty'; it rates nothing"),
        ({"objectives": [*OBJECTIVES, Objective("wit", 1, 5)]}, "no rating of 'wit'; it rates helpfulness, honesty"),
        ({"layout": "rows"}, "layout 'rows' is not one of records"),
        ({"fields": {"promt": "x"}}, "unknown key data.fields.promt; did you mean data.fields.prompt"),
        ({"template": {"prompt": "{prompt}"}}, "template.prompt must contain {tags} and {prompt} once each"),
        ({"template": {"prompt": "chat"}}, "template.prompt: chat needs a tokenizer with a chat template"),
        ({"max_tokens": 0}, "data.max_tokens: 0 is not in"),
        ({"seed": -1}, "seed: -1 is not in"),
    ],
)
def test_wrong_options_are_named(options, match):
    given = {"objectives": OBJECTIVES} | options
    with pytest.raises((TypeError, ValueError), match=match):
        RatedData(dataset(), tiny.tokenizer(), **given)


@pytest.mark.parametrize(
    "conditions, match",
    [
        ({"anew": True}, "conditions.anew: rows are drawn once here; set conditions.draws"),
        ({"mixture": [{"sampler": "all"}]}, "sampler 'all' is not one of attained"),
        ({"per_promt": 3}, "unknown key conditions.per_promt; did you mean conditions.per_prompt"),
        ({"mixture": [{"sampler": "attained", "levels": {"honesty": 2}}]}, "nothing to train on in 6 records"),
        ("attained", "conditions: expected a mapping of keys, got 'attained'"),
    ],
)
def test_wrong_conditions_are_named(conditions, match):
    data = RatedData(dataset(), tiny.tokenizer(), OBJECTIVES)
    for draw in (data.cpsft, data.cdpo):
        with pytest.raises((TypeError, ValueError), match=match):
            draw(conditions)


def test_a_row_that_the_chat_template_refuses_is_named():
    data = RatedData(dataset(TALKS), byte_level(GEMMA), OBJECTIVES)
    with pytest.raises(ValueError, match="the dataset, row [01]: .*System role not supported"):
        data.cpsft()


def test_rows_with_tokens_whose_prompt_fills_max_length_are_dropped(tmp_path):
    """As TRL drops them; a longer response is cut by its collator."""
    records = [*TEXTS, Record("y" * 70, ANSWERS)]
    data = RatedData(dataset(records), tiny.tokenizer(), OBJECTIVES)
    rows = data.cdpo(CONDITIONS)
    short = [i for i, ids in enumerate(rows["prompt_ids"]) if len(ids) < 60]
    trainer = dpo(data, tmp_path, small(data), small(data), max_length=60)
    assert 0 < len(short) < len(rows) and trainer.train_dataset["prompt_ids"] == rows.select(short)["prompt_ids"]


def test_precomputed_references_of_rows_with_tokens(tmp_path):
    data = RatedData(dataset(), tiny.tokenizer(), OBJECTIVES)
    losses = []
    for precompute in (False, True):
        trainer = dpo(data, tmp_path, small(data), small(data, seed=1), precompute_ref_log_probs=precompute)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][0] != pytest.approx(math.log(2), rel=1e-3)
