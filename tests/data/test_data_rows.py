"""What a row says beside its prompt and answers, and files that are packed, cut off or broken. Nothing is dropped."""

import bz2
import gzip
import json
import lzma
import re

import datasets
import pytest

from cpo_kernels.data.command import main
from cpo_kernels.data.records import DataError, Record, Response, write_records
from cpo_kernels.data.sources import load_records, notes
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.requests import read_prompts
from cpo_kernels.evaluation.run import main as evaluate
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import SourceConfig, TemplateConfig
from cpo_kernels.training.loop import train
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401
from tests.support.tokenizers_at_odds import CHATML, byte_level

HONESTY = [Objective("honesty", 1, 5)]
CALL = [{"type": "function", "function": {"name": "sky", "arguments": "{}"}}]
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]


def data(**keys):
    return read_config({"data": keys}).data


def load(path, rows, objectives=(), report=None, **keys):
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records([path], data(**keys), objectives, {} if report is None else report)


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def keys(**extra):
    return json.dumps(extra)


# -------------------------------------------------------------------- messages


def test_what_a_message_says_beside_its_text_is_kept(tmp_path):
    called = [assistant(None, tool_calls=CALL)]
    row = {
        "prompt": [user("Sky?", name="Ada")],
        "chosen": called,
        "rejected": [assistant("No.", reasoning_content="x")],
    }
    (record,) = load(tmp_path, [row], layout="pairs")
    assert record.prompt == (("user", "Sky?", keys(name="Ada")),)
    assert [r.extra for r in record.responses] == [keys(tool_calls=CALL), keys(reasoning_content="x")]
    talk = [user("Sky?"), *called, {"role": "tool", "content": "blue", "tool_call_id": "1"}]
    rated = {"prompt": talk, "responses": [{"text": assistant("Blue.", thinking="x"), "ratings": {"honesty": 5}}]}
    (record,) = records = load(tmp_path, [rated], HONESTY)
    assert record.prompt[1:] == (("assistant", "", keys(tool_calls=CALL)), ("tool", "blue", keys(tool_call_id="1")))
    assert record.responses == (Response("Blue.", {"honesty": 5.0}, keys(thinking="x")),)
    write_records(records, tmp_path / "again.jsonl")
    assert load_records([tmp_path / "again.jsonl"], data(), HONESTY, {}) == records
    answers = [
        {"prompt": "Sky?", "response": text, "ratings": {}} for text in ("Blue.", [assistant("", tool_calls=CALL)])
    ]
    (record,) = load(tmp_path, answers, HONESTY, layout="answers")
    assert [r.extra for r in record.responses] == ["", keys(tool_calls=CALL)]


def test_empty_and_ignored_keys_say_nothing(tmp_path):
    """`datasets` fills what a message has not with null."""
    rows = [
        {
            "prompt": [user("Sky?", name=None, tool_calls=[])],
            "chosen": assistant("a", timestamp=3),
            "rejected": assistant("b"),
        }
    ]
    (record,) = load(tmp_path, rows, layout="pairs", fields={"ignore": ["timestamp"]})
    assert record == Record("Sky?", (Response("a", {"overall": 1.0}), Response("b", {"overall": 0.0})))
    parts = [{"type": "text", "text": "Sky"}, {"type": "text", "text": "?"}]
    assert load(tmp_path, [{**rows[0], "prompt": [user(parts)]}], layout="pairs")[0].prompt == "Sky?"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": [user([{"type": "image"}, {"type": "text", "text": "?"}])]}, "only content parts of type text"),
        (
            {"prompt": [{"role": "human", "content": "Sky?"}]},
            "write {role: system | user | assistant | tool | developer",
        ),
        ({"prompt": [user("Sky?"), assistant("Blue")]}, "must end with a user message"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "needs a user message"),
        ({"prompt": [user([{"type": "text", "text": None}])]}, "only content parts of type text"),
        ({"prompt": [{"role": "options", "content": "x"}, user("Sky?")]}, "write {role: system"),
        ({"prompt": [{"role": "options", "name": "x"}, user("Sky?")]}, "write {role: system"),
        ({"images": ["a.png"]}, "'images' holds ['a.png'], which a text model cannot read"),
        ({"tools": "[{"}, "field 'tools' is not valid JSON"),
        ({"tools": {"name": "sky"}}, "field 'tools' must be a list"),
        ({"chat_template_kwargs": ["deep"]}, "field 'chat_template_kwargs' must be an object"),
        ({"chosen": [assistant("a"), assistant("b")]}, "differ before their last message"),
        ({"prompt": "Sky?", "chosen": "half a pair: \ud83d"}, "half of a surrogate pair"),
        ({"prompt": "Sky \ud83d"}, "half of a surrogate pair"),
        ({"score_chosen": float("inf"), "score_rejected": 1}, "rating inf is not a finite number"),
        ({"score_chosen": [1], "score_rejected": 1}, "rating [1] is not a number"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_row(tmp_path, change, reason):
    texts = isinstance(change.get("chosen"), str)
    sides = {"chosen": "a", "rejected": "b"} if texts else {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    good = {"prompt": "Sea?"} | sides
    bad = {"prompt": [user("Sky?")]} | sides | change
    with pytest.raises(DataError, match="rows.jsonl:2: .*" + re.escape(reason)):
        load(tmp_path, [good, bad], layout="pairs")
    report = {}
    assert len(load(tmp_path, [good, bad], report=report, layout="pairs", on_bad_line="skip")) == 1
    assert report["bad_lines"] == 1


def test_tools_and_calls_are_written_as_the_row_has_them(tmp_path):
    """In its order of keys, and from a table without those of other rows."""

    def row(name, **arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": arguments}}}
        prompt = [user("Sky?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "blue"}]
        return {"prompt": prompt, "chosen": [assistant("Yes")], "rejected": [assistant("No")], "tools": [tool]}

    rows = [row("sky", at="noon", zone="utc"), row("sea", depth=3, at=None)]
    expected = load(tmp_path, rows, layout="pairs")
    source = "{{ tools | tojson }}" + CHATML
    text = PromptTemplate(byte_level(source), TemplateConfig("chat"), []).text(expected[0].prompt)
    assert json.dumps(rows[0]["tools"]) in text and json.dumps(rows[0]["prompt"][1]["tool_calls"]) in text
    assert '"at": null' in expected[1].prompt[0][2]  # which this row itself says
    del rows[1]["prompt"][1]["tool_calls"][0]["function"]["arguments"]["at"]  # and from its tools
    expected = load(tmp_path, rows, layout="pairs")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    for found, record in zip(
        load_records([tmp_path / "t.parquet"], data(layout="pairs"), [], {}), expected, strict=True
    ):
        assert json.loads(found.prompt[0][2]) == json.loads(record.prompt[0][2])
        assert json.loads(found.prompt[2][2]) == json.loads(record.prompt[2][2])


def test_tools_and_template_options_are_part_of_the_prompt(tmp_path):
    rows = [
        {
            "prompt": "Sky?",
            "response": "a",
            "ratings": {},
            "tools": tools,
            "chat_template_kwargs": {"deep": True, "x": None},
        }
        for tools in (TOOLS, json.dumps(TOOLS), [])
    ]
    first, second = records = load(tmp_path, rows, HONESTY, layout="answers")
    assert first.prompt == (("options", "", keys(tools=TOOLS, chat_template_kwargs={"deep": True})), ("user", "Sky?"))
    assert len(first.responses) == 2 and second.prompt[0] == ("options", "", keys(chat_template_kwargs={"deep": True}))
    write_records(records, tmp_path / "again.jsonl")
    assert load_records([tmp_path / "again.jsonl"], data(), HONESTY, {}) == records
    assert json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0])["tools"] == TOOLS


# -------------------------------------------------------------------- columns


def test_prompts_in_several_columns(tmp_path):
    rows = [
        {"instruction": "Translate.", "input": "ciel", "system": "Be kind.", "response": "sky", "ratings": {}},
        {"instruction": "Sing.", "input": " ", "system": None, "response": "la", "ratings": {}},
    ]
    fields = {"prompt": "instruction", "input": "input", "system": "system"}
    first, second = load(tmp_path, rows, HONESTY, layout="answers", fields=fields)
    assert first.prompt == (("system", "Be kind."), ("user", "Translate.\n\nciel")) and second.prompt == "Sing."
    with pytest.raises(
        ValueError, match="data.fields.system: no row of .* has 'sytem'; columns: instruction, input, sys"
    ):
        load(tmp_path, rows, HONESTY, layout="answers", fields={**fields, "system": "sytem"})
    nested = [{"prompt": "a", "response": "x", "ratings": {}, "meta": {"system": "Be kind."}}]
    (record,) = load(tmp_path, nested, HONESTY, layout="answers", fields={"system": "meta.system"})
    assert record.prompt[0] == ("system", "Be kind.")
    with pytest.raises(ValueError, match="no row of .* has 'meta.sytem'"):
        load(tmp_path, nested, HONESTY, layout="answers", fields={"system": "meta.sytem"})
    other = {"prompt": [{"role": "system", "content": "Be brief."}, user("a")], "system": "Be kind.", "responses": []}
    with pytest.raises(
        DataError, match="rows.jsonl:1: .*'system' is 'Be kind.', but the prompt has a different system"
    ):
        load(tmp_path, [other | {"responses": [{"text": "x"}]}], HONESTY, fields={"system": "system"})


def test_a_telling_column_that_nothing_reads_is_counted(tmp_path, capsys):
    rows = [
        {"prompt": p, "response": p, "ratings": {"honesty": i}, "system": s, "id": 3}
        for p, i, s in [("a", 1, "Be kind."), ("a", 5, ""), ("b", 1, "Be kind."), ("b", 3, "Be kind.")]
    ]
    report = {}
    load(tmp_path, rows, HONESTY, report, layout="answers")
    assert report == {"unread_columns": {"system": 3}}
    (note,) = notes(report)
    assert note.startswith("column 'system' of 3 rows is not read: use it in data.fields")
    for fields in ({"system": "system"}, {"ignore": ["system"]}):
        load(tmp_path, rows, HONESTY, report := {}, layout="answers", fields=fields)
        assert report == {}
    recipe = tiny.config("dpo", objectives=tiny.OBJECTIVES[:1], conditions={"responses": None, "per_prompt": 1})
    recipe["data"] = {"train": [str(tmp_path / "rows.jsonl")], "layout": "answers", "eval_share": 0.0}
    recipe["training"]["max_steps"] = 1
    train(recipe, tokenizer=tiny.tokenizer())
    assert capsys.readouterr().err.count(note) == 1
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main([str(tmp_path / "recipe.yaml")]) == 0
    assert capsys.readouterr().out.count(note) == 1


def test_examples_are_rows_that_trl_reads(tmp_path):
    tokenizer = byte_level("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = {
        "prompt": [user("Sky?")],
        "tools": TOOLS,
        "chosen": [assistant("", tool_calls=CALL)],
        "rejected": [assistant("b")],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = {"stage": "dpo", "model": {"tokenizer": str(tmp_path / "tokenizer")}, "template": {"prompt": "chat"}}
    recipe["data"] = {"train": [str(tmp_path / "rows.jsonl")], "layout": "pairs", "eval_share": 0.0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/examples.jsonl").read_text()) == row | {"condition": {}}


def test_a_published_schema_has_no_other_columns(tmp_path):
    with pytest.raises(ValueError, match="data.fields.system: layout ultrasafety has fixed columns"):
        load(tmp_path, [], layout="ultrasafety", fields={"system": "system"})


# -------------------------------------------------------------------- Tulu 3, HelpSteer3


def test_tulu_rows(tmp_path):
    """The prompt as text, chosen and rejected as whole conversations, which may begin before it."""
    before = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user(" Sky?\n")]
    row = {"id": "1", "prompt": "Sky?", "chosen": [*before, assistant("a")], "rejected": [*before, assistant("b")]}
    (record,) = load(tmp_path, [row], layout="pairs")
    assert record.prompt == tuple((m["role"], m["content"]) for m in before) and record.responses[0].text == "a"
    assert load(tmp_path, [row | {"prompt": "Hi"}], layout="pairs") == [record]  # the first turn
    with pytest.raises(DataError, match="messages that differ from prompt 'Sea': add prompt to data.fields.ignore"):
        load(tmp_path, [row | {"prompt": "Sea"}], layout="pairs")
    assert load(tmp_path, [row | {"prompt": "Sea"}], layout="pairs", fields={"ignore": ["prompt"]}) == [record]


@pytest.mark.parametrize("preference, ratings", [(-3, (1, 0)), (-1, (1, 0)), (0, (1, 1)), (2, (0, 1))])
def test_helpsteer3(tmp_path, preference, ratings):
    row = {
        "domain": "general",
        "context": [user("Hi"), assistant("Hello"), user("Sky?")],
        "response1": "a",
        "response2": "b",
    }
    (record,) = load(tmp_path, [row | {"overall_preference": preference}], layout="helpsteer3")
    assert record.prompt == (("user", "Hi"), ("assistant", "Hello"), ("user", "Sky?"))
    assert tuple(r.ratings["overall"] for r in record.responses) == ratings
    (record,) = load(tmp_path, [row | {"overall_preference": preference}], HONESTY, layout="helpsteer3")
    assert tuple(r.ratings["honesty"] for r in record.responses) == tuple(1 + 4 * x for x in ratings)


@pytest.mark.parametrize("preference", [None, 4, "better", [1]])
def test_helpsteer3_without_a_preference(tmp_path, preference):
    row = {"context": [user("Hi")], "response1": "a", "response2": "b", "overall_preference": preference}
    with pytest.raises(DataError, match="rows.jsonl:1: .*(overall_preference|is not a number)"):
        load(tmp_path, [row], layout="helpsteer3")


# -------------------------------------------------------------------- files

LINE = {"prompt": "a", "responses": [{"text": "b", "ratings": {"honesty": 5}}]}
TEXT = (json.dumps(LINE) + "\r\n").encode("utf-8-sig")  # a byte order mark and the line ends of Windows
CSV = b"prompt,response,h\r\na,b,5\r\n"


@pytest.mark.parametrize("pack, end", [(gzip, ".gz"), (bz2, ".bz2"), (lzma, ".xz"), (None, "")])
def test_packed_files(tmp_path, pack, end):
    for name, content, settings in [
        ("r.jsonl", TEXT, {}),
        ("r.NDJSON", TEXT, {}),
        ("r.csv", CSV, {"layout": "answers", "fields": {"ratings": {"honesty": "h"}}}),
    ]:
        (tmp_path / (name + end)).write_bytes(pack.compress(content) if pack else content)
        records = load_records([tmp_path / (name + end)], data(**settings), HONESTY, {})
        assert records == [Record("a", (Response("b", {"honesty": 5.0}),))]
    if pack:
        whole = pack.compress(json.dumps(LINE).encode() + bytes(range(32, 127)) * 9999)
        (tmp_path / ("cut.jsonl" + end)).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="cut.jsonl.*: Compressed file ended before the end-of-stream marker"):
            load_records([tmp_path / ("cut.jsonl" + end)], data(), HONESTY, {})


def test_prompts_are_read_from_packed_files_too(tmp_path):
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(TEXT))
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(b"a\n\nb\n"))
    assert read_prompts(tmp_path / "p.jsonl.gz") == [Record("a", ())]
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "a", "tools": TOOLS}) + '\n{"prompt": "a", "image": "b.png"}'
    )
    with pytest.raises(DataError, match="p.jsonl:2: field 'image' holds 'b.png'"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "tools": TOOLS}))
    assert read_prompts(tmp_path / "p.jsonl")[0].prompt[0] == ("options", "", keys(tools=TOOLS))
    assert [r.prompt for r in read_prompts(tmp_path / "p.txt.gz")] == ["a", "b"]


@pytest.mark.parametrize("name", ["p.json", "p.json.gz", "p.csv", "p.parquet"])
def test_prompts_are_read_from_every_file_of_rows(tmp_path, monkeypatch, name):
    """A .json file is no text with a prompt on every line: the published prompts of the method are JSON arrays."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows):
        table = datasets.Dataset.from_list(rows)
        if name == "p.csv":
            table.to_csv(tmp_path / name)
        elif name == "p.parquet":
            table.to_parquet(tmp_path / name)
        else:
            text = json.dumps(rows, indent=1).encode()
            (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)

    write([{"prompt": "Sky?", "id": 0}, {"prompt": "Sea,\nwhere?", "id": 1}])
    assert [record.prompt for record in read_prompts(tmp_path / name)] == ["Sky?", "Sea,\nwhere?"]
    write([{"user_query": "Sky?", "id": 0}])
    with pytest.raises(DataError, match=f"{name}:.*no field 'prompt'.*; fields: user_query, id"):
        read_prompts(tmp_path / name)


def test_prompts_in_a_damaged_file_are_named(tmp_path):
    (tmp_path / "p.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match="p.txt: .*save the file as UTF-8"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.jsonl.gz").write_bytes(TEXT)
    with pytest.raises(DataError, match="p.jsonl.gz: Not a gzipped file"):
        read_prompts(tmp_path / "p.jsonl.gz")


def test_a_long_field_of_a_csv_file(tmp_path):
    """Python's csv module refuses more than 131,072 characters unless told otherwise."""
    answer = "so " * 50_000
    (tmp_path / "r.csv").write_text(f"prompt,response,h\na,{answer},5\nb,c,4\n")
    sections = {"layout": "answers", "fields": {"ratings": {"honesty": "h"}}}
    first, second = load_records([tmp_path / "r.csv"], data(**sections), HONESTY, {})
    assert first.responses[0].text == answer and second.responses[0].text == "c"


@pytest.mark.parametrize("name", ["r.jsonl.zst", "r.zip", "r.tsv", "r.txt", "r"])
def test_other_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(TEXT)
    with pytest.raises(ValueError, match=f"{name}': unknown file extension; use one of .jsonl.*gz"):
        load_records([SourceConfig(str(tmp_path / name))], data(), HONESTY, {})


@pytest.mark.parametrize(
    "line, reason",
    [
        (json.dumps([LINE]), "expected a JSON object, got list .* name a file that holds one JSON array .json"),
        ("[", "Expecting value.* name a file that holds one JSON array .json"),
        (
            json.dumps(LINE)[:40],
            'Unterminated string.*: each line must be one complete JSON object, got \'{"prompt": "a"',
        ),
        ("3.5", "expected a JSON object, got float '3.5'"),
        ("[" * 100_000, "each line must be one complete JSON object"),
        (json.dumps(LINE | {"responses": 5}), "'responses' must be a list of objects, got 5"),
        (json.dumps(LINE | {"responses": [{"text": "b", "ratings": 0.5}]}), "`ratings` must be a dict of .*, got 0.5"),
        (json.dumps(LINE | {"responses": [{"text": "b", "ratings": {"honesty": {}}}]}), "rating {} is not a number"),
    ],
)
def test_broken_lines(tmp_path, line, reason):
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(DataError, match="r.jsonl:2: .*" + reason):
        load_records([tmp_path / "r.jsonl"], data(), HONESTY, {})
    assert len(load_records([tmp_path / "r.jsonl"], data(on_bad_line="skip"), HONESTY, {})) == 1


def test_a_file_without_a_good_row_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no records in .*r.jsonl$"):
        load_records([tmp_path / "r.jsonl"], data(), HONESTY, {})
    (tmp_path / "r.jsonl").write_text("3\n4\n")
    with pytest.raises(
        ValueError, match="no records in .*; bad rows skipped: 2, the first: .*r.jsonl:1: expected a JSON"
    ):
        load_records([tmp_path / "r.jsonl"], data(on_bad_line="skip"), HONESTY, {})


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("r.json", b"", "the file is empty"),
        ("r.parquet", b"", "the file is empty"),
        ("r.json", json.dumps([LINE, 3]).encode(), "a .json file must hold a list of objects, or one object per line"),
        ("r.json", b"3", "a .json file must hold a list of objects, or one object per line"),
        ("r.jsonl.gz", TEXT, "Not a gzipped file"),
        ("r.jsonl", TEXT.decode().encode("utf-16"), "save the file as UTF-8"),
        ("r.csv", "prompt,responses\ncafé,b\n".encode("latin-1"), "save the file as UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path, monkeypatch, name, content, reason):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{reason}"):
        load_records([tmp_path / name], data(), HONESTY, {})


@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
def test_json_arrays(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = json.dumps([LINE]).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert load_records([tmp_path / name], data(), HONESTY, {}) == [Record("a", (Response("b", {"honesty": 5.0}),))]


# -------------------------------------------------------------------- values of a recipe and of a results file


@pytest.mark.parametrize(
    "sections, reason",
    [
        ({"objectives": 0.5}, r"objectives\[0\]: expected a mapping of keys, got 0.5 \(keys: name, low, high, ...\)"),
        ({"objectives": "honesty"}, "objectives.*mapping of keys.*'honesty'"),
        ({"objectives": {"honesty": 5}}, "objectives.*honesty"),
        ({"conditions": {"mixture": [{"sampler": "grid", "values": {"honesty": 9}}]}}, r"values.*honesty.*levels.*9"),
        ({"conditions": {"mixture": [{"values": {"honesty": ["high"]}}]}}, "values.*honesty.*'high'"),
        ({"conditions": {"mixture": [{"levels": {"honesty": [5]}}]}}, r"levels.*honesty.*\[5\]"),
        (
            {"conditions": {"balance": True, "class_weights": [{"honesty": 1, "weight": "much"}]}},
            "class_weights.*'much'",
        ),
        ({"conditions": {"balance": True, "class_weights": [0.5]}}, "class_weights.*0.5"),
        ({"data": {"fields": {"ratings": {"honesty": {"field": "h", "map": [1]}}}}}, "honesty.*map.*1"),
        ({"data": {"fields": {"ratings": {"honesty": 5}}}}, "ratings.honesty: write a field.*got 5"),
        ({"data": {"fields": {"ratings": {"honesty": {"field": 3, "map": {}}}}}}, "ratings.honesty: write a field"),
    ],
)
def test_values_of_the_wrong_kind_in_a_recipe(tmp_path, sections, reason):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(LINE | {"prompt": p}) + "\n" for p in "ab"))
    recipe = tiny.config("cpsft", objectives=tiny.OBJECTIVES[:1], conditions={"responses": None, "per_prompt": 1})
    recipe["data"] = {"train": [str(tmp_path / "r.jsonl")], "eval_share": 0.0}
    for name, value in sections.items():
        recipe[name] = {**recipe[name], **value} if name in ("data", "conditions") else value
    with pytest.raises((ValueError, TypeError), match=reason):
        train(recipe, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "answers.json is not a results file"),
        ("[]", "answers.json is not a results file"),
        ('{"objectives": [3], "results": {}}', "answers.json is not a results file"),
        ('{"objectives": {"name": "honesty"}, "results": {}}', "answers.json is not a results file"),
    ],
)
def test_a_results_file_of_another_kind(tmp_path, content, reason):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        evaluate(["--answers", str(tmp_path / "answers.json")])
