"""Published schemas, TRL's preference format, and where rows come from. All rows are written here."""

import csv
import json
import re

import datasets
import pytest

from cpo_kernels.data.records import DataError, Record, Response, prompt_text, write_records
from cpo_kernels.data.sources import load_records, overall_objective, split_by_prompt
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.requests import read_prompts
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import SourceConfig
from tests.support import tiny

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def data(**keys):
    return read_config({"data": keys}).data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, rows, objectives=(), report=None, **keys):
    return load_records([write(path / "rows.jsonl", rows)], data(**keys), objectives, {} if report is None else report)


def objectives(low, high, *names):
    return [Objective(name, low, high) for name in names]


def aspect(rating):
    return {"Rating": rating, "Rationale": "because"}


def ultrafeedback(prompt, *ratings):
    """One row of openbmb/UltraFeedback: `ratings` are (helpfulness, honesty) of the completions."""
    names = ("instruction_following", "truthfulness")
    completions = [
        {
            "model": "m",
            "principle": "helpfulness",
            "custom_system_prompt": "",
            "response": f"answer {i}",
            "annotations": {"helpfulness": aspect(help), "honesty": aspect(honest)} | {n: aspect("3") for n in names},
            "overall_score": 7.5,
        }
        for i, (help, honest) in enumerate(ratings)
    ]
    return {"source": "flan", "instruction": prompt, "models": ["m"] * len(ratings), "completions": completions}


def ultrasafety(prompt, *ratings):
    completions = [
        {"model": "m", "response": f"reply {i}", "annotations": {"harmlessness": [aspect(rating)]}}
        for i, rating in enumerate(ratings)
    ]
    return {"source": "s", "instruction": prompt, "models": ["m"], "completions": completions}


# -------------------------------------------------------------------- schemas


def test_ultrafeedback(tmp_path):
    rows = [ultrafeedback("Why?", ("5", "1"), ("N/A", "3"), ("2", "N/A"), ("N/A", "N/A"))]
    names = objectives(1, 5, "honesty", "helpfulness")
    (record,) = load(tmp_path, rows, names, layout="ultrafeedback")
    assert record.prompt == "Why?" and [r.text for r in record.responses] == [f"answer {i}" for i in range(4)]
    found = [r.ratings for r in record.responses]
    assert found == [{"helpfulness": 5, "honesty": 1}, {"honesty": 3}, {"helpfulness": 2}, {}]
    (record,) = load(tmp_path, rows, objectives(1, 5, "truthfulness"), layout="ultrafeedback")
    assert record.responses[0].ratings == {"truthfulness": 3}
    with pytest.raises(ValueError, match="ultrafeedback does not rate 'humour'; it rates helpfulness, honesty"):
        load(tmp_path, rows, objectives(1, 5, "humour"), layout="ultrafeedback")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda row: row["completions"][1]["annotations"]["honesty"].update(Rating="five"), "rating 'five' is not a"),
        (lambda row: row["completions"][1]["annotations"]["honesty"].update(Rating="7"), "rating 7 of honesty is outs"),
        (lambda row: row["completions"][1]["annotations"].pop("honesty"), "annotations.honesty must hold a Rating"),
        (lambda row: row["completions"][0].update(response=None), "field 'response' must be a string, got None"),
        (lambda row: row.update(completions=[]), r"field 'completions' must be a list of objects, got \[\]"),
        (lambda row: row.update(instruction=" "), "field 'instruction' is empty"),
    ],
)
def test_a_broken_row_is_named_or_counted(tmp_path, change, reason):
    rows = [ultrafeedback(f"Why {i}?", ("5", "1"), ("2", "3")) for i in range(3)]
    change(rows[1])
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*" + reason):
        load(tmp_path, rows, objectives(1, 5, "honesty"), layout="ultrafeedback")
    report = {}
    kept = load(tmp_path, rows, objectives(1, 5, "honesty"), report, layout="ultrafeedback", on_bad_line="skip")
    assert [r.prompt for r in kept] == ["Why 0?", "Why 2?"] and report["bad_lines"] == 1
    assert "rows.jsonl:2:" in report["bad_line_reasons"][0]


def test_ultrasafety_zero_is_a_rating(tmp_path):
    rows = [ultrasafety("How?", 1, 0, 0, "1"), ultrasafety("What?", "0", "N/A")]
    first, second = load(tmp_path, rows, objectives(0, 1, "harmlessness"), layout="ultrasafety")
    assert [r.ratings for r in first.responses] == [{"harmlessness": x} for x in (1, 0, 0, 1)]
    assert [r.ratings for r in second.responses] == [{"harmlessness": 0}, {}]


def test_helpsteer2_two_rows_make_one_prompt_and_turns_are_messages(tmp_path):
    long = "Hi\n\n<extra_id_1>Assistant\nHello, you.\n\n<extra_id_1>User\nWhat is C#?"
    rows = [
        {"prompt": prompt, "response": f"{i}", "helpfulness": i, "correctness": 4, "coherence": 4, "complexity": 2}
        | {"verbosity": 4 - i}
        for prompt, i in (("c#", 3), ("c#", 0), (long, 1), (long, 2))
    ]
    names = objectives(0, 4, "helpfulness", "verbosity")
    first, second = load(tmp_path, rows, names, layout="helpsteer")
    assert [(r.text, r.ratings) for r in first.responses] == [
        ("3", {"helpfulness": 3, "verbosity": 1}),
        ("0", {"helpfulness": 0, "verbosity": 4}),
    ]
    assert second.prompt == (("user", "Hi"), ("assistant", "Hello, you."), ("user", "What is C#?"))
    assert len(second.responses) == 2
    del rows[1]["verbosity"]
    with pytest.raises(DataError, match="rows.jsonl:2: no field 'verbosity'"):
        load(tmp_path, rows, names, layout="helpsteer")


def saferlhf(**changes):
    row = {"prompt": "How?", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    row |= {"is_response_0_safe": False, "is_response_1_safe": True}
    return row | {"response_0_severity_level": 2, "response_1_severity_level": 0} | changes


def test_pku_saferlhf(tmp_path):
    rows = [saferlhf(), saferlhf(better_response_id=1, is_response_0_safe=True)]
    names = [*objectives(0, 1, "helpfulness", "harmlessness", "safety"), Objective("mildness", 0, 3)]
    first, second = load(tmp_path, rows, names, layout="pku_saferlhf")  # one prompt: its pairs stay apart
    assert [list(r.ratings.values()) for r in first.responses] == [[1, 0, 0, 1], [0, 1, 1, 3]]
    assert list(first.responses[0].ratings) == ["helpfulness", "safety", "harmlessness", "mildness"]
    assert [r.ratings["helpfulness"] for r in second.responses] == [0, 1]
    with pytest.raises(DataError, match="rows.jsonl:1: field 'safer_response_id' must be 0 or 1, got 2"):
        load(tmp_path, [saferlhf(safer_response_id=2)], names, layout="pku_saferlhf")
    with pytest.raises(DataError, match="'is_response_1_safe' must be true or false, got 1"):
        load(tmp_path, [saferlhf(is_response_1_safe=1)], names, layout="pku_saferlhf")


def test_ratings_of_null_are_none_and_a_byte_order_mark_is_no_text(tmp_path):
    answers = [{"text": "a", "ratings": {"honesty": 1}}, {"text": "b", "ratings": None}, {"text": "c"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "responses": answers}), encoding="utf-8-sig")
    source = SourceConfig(str(tmp_path / "rows.jsonl"), "records")
    (record,) = load_records([source], data(), objectives(1, 5, "honesty"), {})
    assert [r.ratings for r in record.responses] == [{"honesty": 1.0}, {}, {}]
    (tmp_path / "prompts.txt").write_text("one\u2028line\r\n\ntwo\n", encoding="utf-8-sig")
    assert [r.prompt for r in read_prompts(tmp_path / "prompts.txt")] == ["one\u2028line", "two"]


def test_hh_rlhf(tmp_path):
    begin = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nHuman: So?\n\nAssistant:"
    rows = [{"chosen": begin + " Well.", "rejected": begin + " No: \n\nnever."}]
    (record,) = load(tmp_path, rows, layout="hh_rlhf")
    assert record.prompt == (("user", "Hi"), ("assistant", "Hello."), ("user", "And?\n\nSo?"))
    assert record.responses == (Response("Well.", {"overall": 1.0}), Response("No: \n\nnever.", {"overall": 0.0}))
    single = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant:"}] * 2
    named = load(tmp_path, single, [Objective("harmlessness", 0, 5)], layout="hh_rlhf")
    assert [r.prompt for r in named] == ["Hi", "Hi"]  # rows of one prompt stay apart
    assert [r.ratings["harmlessness"] for r in named[0].responses] == [5, 0] and named[0].responses[1].text == ""
    both = objectives(0, 5, "helpfulness", "harmlessness")
    with pytest.raises(ValueError, match="not on which of helpfulness, harmlessness: train with a single objective"):
        load(tmp_path, single, both, layout="hh_rlhf")
    for chosen, reason in (
        ("\n\nHuman: Ho\n\nAssistant: Yo", "differ before their last answer"),
        ("Human: Hi", "must consist of Human and Assistant turns"),
        ("\n\nHuman: Hi\n\nAssistant: a\n\nHuman: b", "must consist of Human and Assistant turns"),
    ):
        with pytest.raises(DataError, match="rows.jsonl:1: .*" + reason):
            load(tmp_path, [{**single[0], "chosen": chosen}], layout="hh_rlhf")


# -------------------------------------------------------------------- TRL's preference format


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
TRL = {
    "plain": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", " blue."),
    "plain, implicit prompt": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue."),
    "messages": (
        {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("No.")]},
        "Sky?",
        "Blue.",
    ),
    "messages, implicit prompt": (
        {"chosen": [SYSTEM, user("Sky?"), assistant("Blue.")], "rejected": [SYSTEM, user("Sky?"), assistant("No.")]},
        (("system", "Be kind."), ("user", "Sky?")),
        "Blue.",
    ),
    "text prompt, whole conversations": (
        {"prompt": "Sky?", "chosen": [user("Sky?"), assistant("Blue.")], "rejected": [user("Sky?"), assistant("No.")]},
        "Sky?",
        "Blue.",
    ),
}


@pytest.mark.parametrize("kind", TRL)
def test_trl_preference_format(tmp_path, kind):
    row, prompt, chosen = TRL[kind]
    (record,) = records = load(tmp_path, [row], layout="pairs")
    assert record.prompt == prompt and record.responses[0] == Response(chosen, {"overall": 1.0})
    assert overall_objective(records) == Objective("overall", 0, 1)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": [user("Sky?")]}, "'chosen' must end with the assistant's answer"),
        ({"prompt": [assistant("Sky?")]}, "a prompt must end with a user message, got ('assistant', 'Sky?')"),
        ({"chosen": [{"role": "gpt", "content": "x"}]}, "system | user | assistant"),
        ({"chosen": [user("Sea?"), assistant("Blue.")]}, "chosen and rejected differ before their last message"),
        (
            {"chosen": [user("Sea?"), assistant("a")], "rejected": [user("Sea?"), assistant("b")]},
            "that differ from prompt",
        ),
        ({"prompt": None, "chosen": "Yes.", "rejected": "No."}, "'Yes.' and 'No.' have no common beginning"),
    ],
)
def test_broken_preference_rows(tmp_path, change, reason):
    with pytest.raises(DataError, match="rows.jsonl:1: .*" + re.escape(reason)):
        load(tmp_path, [TRL["messages"][0] | change], layout="pairs")


def test_conversations_through_the_chat_template(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    levels = objectives(1, 5, "honesty")
    made = PromptTemplate(tokenizer, read_config({"template": {"prompt": "chat", "system": "Short."}}).template, levels)
    talk = (("user", "Hi"), ("assistant", "Hello"), ("user", "So?"))
    text = "[user] Hi\n[assistant] Hello\n[user] <honesty: 4> So?\n[assistant] "
    assert made.text(talk, {"honesty": 4}) == "[system] Short.\n" + text
    assert made.text((("system", "Long."), *talk), {"honesty": 4}) == "[system] Long.\n" + text
    assert made.text("So?") == "[system] Short.\n[user] So?\n[assistant] "
    plain = PromptTemplate(tokenizer, read_config({}).template, levels)
    with pytest.raises(ValueError, match="no place for earlier messages: use chat"):
        plain.text(talk)


def test_conversations_are_split_written_and_read_back(tmp_path):
    records = [
        Record((("user", f"{i}"), ("assistant", "b"), ("user", "c")), (Response("x", {"honesty": 2.0}),))
        for i in range(10)
    ]
    write_records(records, tmp_path / "r.jsonl")
    assert load_records([tmp_path / "r.jsonl"], data(), objectives(1, 5, "honesty"), {}) == records
    train, held_out = split_by_prompt([*records, Record("text", records[0].responses)], 0.3, 0)
    assert len(train) == 8 and len(held_out) == 3
    assert prompt_text(records[0].prompt) == "user: 0\nassistant: b\nuser: c"


# -------------------------------------------------------------------- where rows come from


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


ROWS = [ultrafeedback(f"Why {i}?", ("5", "N/A"), ("2", "3")) for i in range(7)]
NAMES = objectives(1, 5, "honesty", "helpfulness")


def from_source(source, **keys):
    return load_records([SourceConfig(**source)], data(layout="ultrafeedback", **keys), NAMES, {})


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_json_and_folders_read_like_jsonl(tmp_path, offline_cache, streaming):
    expected = load(tmp_path, ROWS, NAMES, layout="ultrafeedback")
    table = datasets.Dataset.from_list(ROWS)
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder/train-0.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    for path in ("folder/train-0.parquet", "folder/*.parquet", "rows.json", "folder"):
        assert from_source({"path": str(tmp_path / path), "streaming": streaming}) == expected, path
    assert from_source({"path": str(tmp_path / "folder"), "streaming": streaming, "rows": 3}) == expected[:3]
    if not streaming:
        table.save_to_disk(tmp_path / "saved")
        assert from_source({"path": str(tmp_path / "saved")}) == expected
        datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
        assert from_source({"path": str(tmp_path / "splits")}) == expected
        with pytest.raises(ValueError, match="has no split 'test'; splits: train"):
            from_source({"path": str(tmp_path / "splits"), "split": "test"})
        with pytest.raises(ValueError, match="this kind of source does not take subset, streaming"):
            from_source({"path": str(tmp_path / "saved"), "subset": "x", "streaming": True})
        assert from_source({"path": str(tmp_path / "folder"), "split": "train[2:4]"}) == expected[2:4]


def test_a_broken_row_of_a_table_is_named(tmp_path, offline_cache):
    rows = [*ROWS[:2], ultrafeedback("Why?", ("5", "six"))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet:row 3: rating 'six' is not a number"):
        from_source({"path": str(tmp_path / "t.parquet")})
    assert len(from_source({"path": str(tmp_path / "t.parquet")}, on_bad_line="skip")) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name, text", [("t.json", '[{"instruction": "p"}, {"inst'), ("t.parquet", "PAR1 and no more")])
def test_a_damaged_file_is_named(tmp_path, offline_cache, streaming, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: (Unmatched|Parquet magic bytes)"):
        from_source({"path": str(tmp_path / name), "streaming": streaming})


def test_csv_fields_are_texts(tmp_path):
    with open(tmp_path / "r.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["prompt", "response", "h"], ["12", "N/A", "4"], ["p, q", "two\nlines", ""], ["12", "7", "1.5"]]
        )
    keys = data(layout="answers", fields={"ratings": {"honesty": "h"}})
    first, second = load_records([tmp_path / "r.csv"], keys, objectives(1, 5, "honesty"), {})
    assert first == Record("12", (Response("N/A", {"honesty": 4.0}), Response("7", {"honesty": 1.5})))
    assert second == Record("p, q", (Response("two\nlines"),))
    (tmp_path / "r.csv").write_text("prompt,response,h\na,b,1\na,b\n")
    with pytest.raises(DataError, match=r"r.csv:3: the header has 3 fields, the row has fewer"):
        load_records([tmp_path / "r.csv"], keys, objectives(1, 5, "honesty"), {})
    (tmp_path / "r.csv").write_bytes(b"prompt,response,h\n\xff,b,1\n")
    with pytest.raises(DataError, match=r"r.csv: 'utf-8' codec can't decode"):
        load_records([tmp_path / "r.csv"], keys, objectives(1, 5, "honesty"), {})


def test_hub_names_and_sources_of_different_layouts(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: asked.append((args, keys)) or iter(ROWS))
    safety = write(tmp_path / "s.jsonl", [ultrasafety("How?", 1, 0)])
    train = [
        {"path": "openbmb/UltraFeedback", "subset": "default", "streaming": True, "rows": 2},
        {"path": str(safety), "layout": "ultrasafety"},
    ]
    keys = data(layout="ultrafeedback", train=train)
    names = [*NAMES, Objective("harmlessness", 0, 1)]
    records = load_records(keys.train, keys, names, {})
    assert asked == [(("openbmb/UltraFeedback", "default"), {"data_dir": None, "split": "train", "streaming": True})]
    assert [record.prompt for record in records] == ["Why 0?", "Why 1?", "How?"]
    assert records[2].responses[1].ratings == {"harmlessness": 0}


@pytest.mark.parametrize(
    "source, error, reason",
    [
        ({"path": "no.parquet"}, FileNotFoundError, "'no.parquet' does not exist"),
        ({"path": "no/*.jsonl"}, FileNotFoundError, "does not exist"),
        ({"path": "rows.jsonl", "split": "test"}, ValueError, "this kind of source does not take split"),
        (
            {"path": "rows.jsonl", "layout": "ultra"},
            ValueError,
            "layout 'ultra' is not one of records, answers, pairs, rated_pairs, ul",
        ),
    ],
)
def test_bad_sources(tmp_path, monkeypatch, source, error, reason):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(error, match=reason):
        from_source(source)


def test_rated_pairs_are_grouped_by_prompt(tmp_path):
    """A rating for each objective on both sides; a response that stands in several pairs is one response."""
    names = objectives(1, 5, "honesty", "helpfulness")
    scores = {"A": [5, None], "B": [1, 4], "C": [None, None]}
    rows = [
        {"prompt": "Why?", "chosen": a, "rejected": b, "chosen_scores": scores[a], "rejected_scores": scores[b]}
        for a, b in ("AB", "BC", "CA")
    ]
    (record,) = load(tmp_path, rows, names, layout="rated_pairs")
    found = {r.text: r.ratings for r in record.responses}
    assert len(record.responses) == 3
    assert found == {"A": {"honesty": 5}, "B": {"honesty": 1, "helpfulness": 4}, "C": {}}
    other = {**rows[0], "chosen_scores": [4, None]}  # the same text with another rating is another response
    (record,) = load(tmp_path, [*rows, other], names, layout="rated_pairs")
    assert [r.ratings["honesty"] for r in record.responses if r.text == "A"] == [5, 4]
    with pytest.raises(ValueError, match="layout rated_pairs needs objectives"):
        load(tmp_path, rows, layout="rated_pairs")
    with pytest.raises(DataError, match="rows.jsonl:2: field 'rejected_scores' must hold one number"):
        load(tmp_path, [rows[0], {**rows[1], "rejected_scores": [1]}], names, layout="rated_pairs")
