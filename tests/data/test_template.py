"""Prompt and response as tokens: those of the whole text, with the end of a turn that the chat template writes."""

import json
import os

import pytest
import torch
from transformers import ByT5Tokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from cpo_kernels.data.command import main as count
from cpo_kernels.data.records import DataError, Record, Response
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.evaluation.likelihood import score_answers
from cpo_kernels.evaluation.run import main as evaluate
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import TemplateConfig
from cpo_kernels.training.loop import train
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401
from tests.support.tokenizers_at_odds import CHATML, GEMMA, byte_level, legacy, metaspace

HONESTY = [Objective("honesty", 1, 5)]
TOKENIZERS = {
    "legacy": legacy,
    "metaspace first": lambda **keys: metaspace("first", **keys),
    "metaspace always": lambda **keys: metaspace("always", **keys),
    "byte level": byte_level,
}


def made(tokenizer, prompt="{tags}{prompt}\n", **keys):
    return PromptTemplate(tokenizer, TemplateConfig(prompt, **keys), HONESTY)


def pieces(template, prompt="Sky?", response="Yes", condition=None):
    prompt, (response,), whole = template.encode(prompt, condition, [Response(response)])
    return list(prompt), list(response), whole


# -------------------------------------------------------------------- one text


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prefix", ["", " "])
def test_prompt_and_response_are_the_ids_of_the_whole_text(kind, begins, ends, prefix):
    """Whatever the tokenizer puts before or after a text: once before the whole, never in between."""
    tokenizer = TOKENIZERS[kind](begins=begins, ends=ends)
    prompt, response, whole = pieces(made(tokenizer, answer_prefix=prefix))
    expected = tokenizer(f"Sky?\n{prefix}Yes")["input_ids"]
    expected = expected[:-1] if ends else expected
    assert [*prompt, *response] == [*expected, tokenizer.eos_token_id]
    assert prompt == made(tokenizer).prompt_ids("Sky?") and whole
    assert prompt.count(tokenizer.bos_token_id) == begins and tokenizer.eos_token_id not in prompt
    written = pieces(made(tokenizer, "<s>{tags}{prompt}\n", answer_prefix=prefix))  # a text that holds BOS itself
    assert (written[0] + written[1]).count(tokenizer.bos_token_id) == 1
    assert pieces(made(tokenizer, answer_prefix=prefix), response="Yes<eos>")[1] == response  # one end, not two


def test_a_dummy_prefix_is_no_part_of_an_answer():
    source = CHATML.replace("<|im_start|>{{ m.role }}", "<|{{ m.role }}|>")
    tokenizer = legacy(source.replace("<|im_start|>assistant", "<|assistant|>"))
    assert tokenizer.convert_ids_to_tokens(pieces(made(tokenizer))[1]) == ["Yes", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(pieces(made(tokenizer, "chat"))[1]) == ["Yes", "<|im_end|>"]


@pytest.mark.parametrize("prompt, response", [("A: ", "Yes"), ("A\n", "\nYes"), ("Sky", "blue")])
@pytest.mark.parametrize("kind", ["legacy", "metaspace first", "byte level"])
def test_tokens_that_merge_at_the_boundary_begin_where_trl_lets_them(kind, prompt, response):
    """One prompt for all responses, up to where the first of them departs; `encode` says that it is not the whole."""
    tokenizer = TOKENIZERS[kind]()
    alone, both = (tokenizer(text)["input_ids"] for text in (prompt, prompt + response))
    length = len(os.path.commonprefix([alone, both]))
    ids, (first, second), whole = made(tokenizer, "{tags}{prompt}").encode(
        prompt, None, [Response(response), Response("!")]
    )
    assert (list(ids), whole) == (both[:length], length == len(alone))
    assert [*ids, *first] == [*both, tokenizer.eos_token_id]
    assert [*ids, *second] == [*tokenizer(prompt + "!")["input_ids"], tokenizer.eos_token_id]


def test_boundaries_that_move_are_counted_and_named(capsys):
    answers = [Response(text, {"honesty": 5.0}) for text in ("Yes", "!")]  # "A: " ends in the blank of "▁Yes"
    records = [Record(f"{x}: ", (answer,)) for x in "ABCDEF" for answer in answers]
    config = tiny.config("cpsft", objectives=tiny.OBJECTIVES[:1], data={"eval_share": 0.0}, training={"max_steps": 1})
    config["conditions"] = {"strip_best": 1}
    report = train(config, tokenizer=metaspace("first"), records=records).report
    assert report["train"]["moved_boundaries"] == 6
    assert "6 prompts end in tokens that depend on the response" in capsys.readouterr().err


def test_a_boundary_without_a_token_before_it_is_refused():
    with pytest.raises(ValueError, match="prompt 'Y' and response become one token at the start of the text"):
        pieces(made(legacy(), "{tags}{prompt}"), "Y", "es")
    assert pieces(made(legacy(begins=True), "{tags}{prompt}"), "Y", "es")[0] == [1]


@pytest.mark.parametrize("kind", ["legacy", "byte level"])
def test_an_empty_response_after_a_prompt_that_ends_in_the_end_token(kind):
    """It is only the end token, not nothing."""
    template = made(TOKENIZERS[kind](), "{tags}{prompt}<eos>")
    assert pieces(template, response="")[1] == [template.end_id] == pieces(template, response="<eos>")[1]
    assert pieces(template, response="Yes")[1][-1] == template.end_id


def test_a_tokenizer_in_python_that_ends_every_text():
    tokenizer = ByT5Tokenizer()
    prompt, response, _ = pieces(made(tokenizer))
    assert prompt + response == tokenizer("Sky?\nYes")["input_ids"]
    assert prompt == tokenizer("Sky?\n", add_special_tokens=False)["input_ids"]


# -------------------------------------------------------------------- the end of a turn

ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
PHI += "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
NO_END = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}"
ENDS = {
    "gemma": (GEMMA, "<end_of_turn>"),
    "chatml": (CHATML, "<|im_end|>"),
    "zephyr": (ZEPHYR + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", "<eos>"),
    "phi": (PHI, "<|im_end|>"),
    "no end": (NO_END + "{% if add_generation_prompt %}[assistant]\n{% endif %}", "<eos>"),
}


@pytest.mark.parametrize("kind", ["legacy", "byte level"])
@pytest.mark.parametrize("name", ENDS)
def test_a_response_ends_as_the_chat_template_ends_a_turn(name, kind):
    source, end = ENDS[name]
    tokenizer = TOKENIZERS[kind](template=source, ends=True, begins=True)
    template = made(tokenizer, "chat")
    prompt, response, whole = pieces(template)
    conversation = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Yes"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    assert response[-1] == template.end_id == tokenizer.convert_tokens_to_ids(end) and whole
    ids = prompt + response if name != "no end" else (prompt + response)[:-1]
    assert text[: len(ids)] == ids  # what follows the end, a line feed, is nothing to learn
    assert tokenizer.decode(response) == f"Yes{end}"
    assert pieces(template, response=f"Yes{end}")[1] == response


def test_an_end_of_two_tokens():
    """Cohere's: the model's own end token is the second."""
    template = made(byte_level(CHATML.replace("<|im_end|>", "<end_of_turn><|im_end|>")), "chat")
    assert template.tokenizer.decode(pieces(template)[1]) == "Yes<end_of_turn><|im_end|>"
    assert template.end_id == template.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_prompt_that_is_written_otherwise_before_an_answer():
    """Gemma 4 and DeepSeek R1 open a thought at the end of a prompt, which a whole conversation does not have."""
    source = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    template = made(byte_level(source), "chat")
    prompt, response, whole = pieces(template)
    assert template.tokenizer.decode(prompt).endswith("assistant\n") and not whole
    assert template.tokenizer.decode(response) == "Yes<|im_end|>"
    assert template.tokenizer.decode(template.prompt_ids("Sky?")).endswith("assistant\n<think>")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("source", [GEMMA, CHATML, ENDS["no end"][0]])
def test_a_prompt_is_encoded_once_for_all_its_responses(source, kind, monkeypatch):
    """Up to its last special token, where the tokenizer cuts every text: the ids are those of the whole texts."""
    tokenizer = TOKENIZERS[kind](template=source)
    template, texts = made(tokenizer, "chat"), []
    ids = template._ids
    monkeypatch.setattr(template, "_ids", lambda given: texts.extend(given) or ids(given))
    for prompt in ("Sky?", "Sky <|im_end|>\n Sky?", "▁ é\n"):
        answers = ["Yes", "", "\n\nYes ", "<start_of_turn>No", " Sky<eos>"]
        prompt_ids, responses, _ = template.encode(prompt, {"honesty": 5}, [Response(answer) for answer in answers])
        before = template.text(prompt, {"honesty": 5})
        for answer, response in zip(answers, responses, strict=True):
            whole = ids([template._whole(before, prompt, {"honesty": 5}, Response(answer))])[0]
            assert [*prompt_ids, *response][: len(whole)] == whole
    assert sum("<honesty: 5>" in text for text in texts) == (13 if source == ENDS["no end"][0] else 3)


def test_a_prompt_that_becomes_another_before_an_answer_is_refused():
    """Else all from there on, what the user says too, would be trained as the response."""
    counted = made(byte_level("{{ messages | length }}" + CHATML), "chat")
    with pytest.raises(ValueError, match=r"'1<\|im_start\|>user.* of this prompt differently if an answer follows"):
        pieces(counted)


def model_that_says(tokenizer, ids):
    """A model that writes `ids` after any prompt, then the first of them for ever."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, eos_token_id=tokenizer.eos_token_id))
    forward, steps = model.forward, [0]

    def says(*args, **keys):
        out = forward(*args, **keys)
        out.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(ids[steps[0] % len(ids)]), len(tokenizer)).float()
        steps[0] += 1
        return out

    model.forward = says
    return model


@pytest.mark.parametrize("from_model", [False, True])
def test_answers_end_where_generate_ends_them(from_model):
    """With the chat template's end of a turn, and with every end token of the model's generation config."""
    tokenizer = byte_level(None if from_model else GEMMA)
    template = made(tokenizer, "{tags}{prompt}" if from_model else "chat")
    ids = tokenizer("yes<end_of_turn>\nuser<eos>")["input_ids"]
    model = model_that_says(tokenizer, ids)
    if from_model:
        model.generation_config = GenerationConfig(eos_token_id=[2, 4])
    assert greedy_answers(model, template, [("Sky?", None)], 12) == ["yes"]


def test_training_leaves_a_model_that_ends_its_turns(tmp_path):
    tokenizer = byte_level(GEMMA)
    config = tiny.config("cpsft", template={"prompt": "chat"}, training={"max_steps": 1})
    result = train(config | {"run_dir": str(tmp_path / "run")}, tokenizer=tokenizer, records=tiny.records(4))
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert set(result.template.end_ids(result.model)) == set(saved["eos_token_id"])


# -------------------------------------------------------------------- what a message says beside its text


CALL = [{"type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}]
OTHER = [{"type": "function", "function": {"name": "sea", "arguments": {}}}]


def calls(value):
    return json.dumps({"tool_calls": value})


def test_tool_calls_go_through_the_template():
    template = made(byte_level(CHATML), "chat")
    _, ids, _ = template.encode("Sky?", None, [Response("", {}, calls(CALL)), Response("", {}, calls(OTHER))])
    first, second = map(template.tokenizer.decode, ids)
    assert first == f"<call>{json.dumps(CALL)}</call><|im_end|>" and "sea" in second
    talk = (("user", "Sky?"), ("assistant", "", calls(CALL)), ("tool", "blue"))
    assert template.text(talk, {"honesty": 5}) == (
        "<|im_start|>user\n<honesty: 5> Sky?<|im_end|>\n<|im_start|>assistant\n"
        f"<call>{json.dumps(CALL)}</call><|im_end|>\n<|im_start|>tool\nblue<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "source, talk, reason",
    [
        (GEMMA, (("user", "Sky?", '{"name": "Ada"}'),), "leaves out name 'Ada' of the user message"),
        (GEMMA, (("user", "a"), ("assistant", "", calls(CALL)), ("user", "b")), "leaves out tool_calls"),
        (CHATML, (("user", "Sky?", '{"weight": 0}'),), "leaves out weight 0"),
        (
            CHATML.replace("m.content", "(m.content if m.role != 'system' else '')"),
            (("system", "Sky"), ("user", "Sky?")),  # a text that stands elsewhere, too
            "leaves out content 'Sky' of the system message",
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}",
            (("system", "Be kind."), ("user", "Sky?")),
            "leaves out content 'Be kind.' of the system message",
        ),
        (CHATML, (("options", "", '{"tools": [{"name": "sky"}]}'), ("user", "Sky?")), "does not take tools from a row"),
        (CHATML, (("options", "", '{"chat_template_kwargs": {"deep": true}}'), ("user", "Sky?")), "does not take deep"),
        (
            CHATML,
            (("options", "", '{"chat_template_kwargs": {"tokenize": true}}'), ("user", "b")),
            "does not take tokenize",
        ),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(source, talk, reason):
    with pytest.raises(ValueError, match=reason):
        made(byte_level(source), "chat").text(talk)


@pytest.mark.parametrize("read", ["m.thought", "m['thought']", "m.get('thought')", "messages[loop.index0].thought"])
def test_an_earlier_thought_may_be_dropped_however_the_template_reads_it(read):
    source = CHATML.replace("{{ m.content }}", "{% if loop.last %}{{ " + read + " or '' }}{% endif %}{{ m.content }}")
    template, thought = made(byte_level(source), "chat"), json.dumps({"thought": "hm"})
    assert "hm" not in template.text((("user", "a"), ("assistant", "b", thought), ("user", "c")))
    _, (response,), _ = template.encode("a", None, [Response("b", {}, thought)])
    assert template.tokenizer.decode(response) == "hmb<|im_end|>"


@pytest.mark.parametrize("role", ["system", "tool"])
def test_any_text_of_a_message_may_stand_in_the_prompt(role):
    """Also the one that a template is tried with."""
    talk = (("user", "a"), (role, "an answer"), ("user", "b"))
    assert "an answer" in made(byte_level(CHATML), "chat").text(talk)


def test_what_a_template_leaves_out_of_a_message_cannot_be_ignored():
    source = CHATML.replace("m.content", "(m.content if m.role != 'system' else '')")
    with pytest.raises(ValueError, match="use a template that writes it, or remove it from the row"):
        made(byte_level(source), "chat").text((("system", "Be kind."), ("user", "Sky?")))


def test_tools_and_template_options_reach_the_template():
    source = "{% for t in tools or [] %}T:{{ t.name }} {% endfor %}{% if deep %}deep {% endif %}" + CHATML
    talk = (("options", "", '{"tools": [{"name": "sky"}], "chat_template_kwargs": {"deep": true}}'), ("user", "Sky?"))
    assert made(byte_level(source), "chat").text(talk).startswith("T:sky deep <|im_start|>user\nSky?")


def test_a_text_prompt_has_no_place_for_them():
    with pytest.raises(ValueError, match="no place for .*tool_calls.*: use chat"):
        made(byte_level()).encode("Sky?", None, [Response("", {}, calls(CALL))])


# -------------------------------------------------------------------- rows that fail here


def test_an_error_of_template_or_tokenizer_names_the_row():
    template = made(byte_level(GEMMA), "chat")
    record = Record((("system", "Be kind."), ("user", "Sky?")), (Response("Yes", {}, place="r.jsonl:7"),), "r.jsonl:7")
    with pytest.raises(DataError, match="r.jsonl:7: TemplateError: System role not supported"):
        score_answers(torch.nn.Linear(1, 1), template, [record], [{}])


def rows(tmp_path):
    """Four rows: in the second the template refuses a role, in the fourth one of three answers."""

    def row(prompt, *texts):
        return {
            "prompt": prompt,
            "responses": [{"text": t, "ratings": {"honesty": 1 + i}} for i, t in enumerate(texts)],
        }

    strange = {"role": "assistant", "content": "x", "name": "Ada"}
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "b?"}]
    made = [row("a?", "x", "y"), row(system, "x", "y"), row("c?", "x", "y"), row("d?", "x", strange, "z")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(tmp_path / "r.jsonl")


@pytest.fixture
def recipe(tmp_path):
    path, tokenizer = rows(tmp_path), byte_level(GEMMA)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = tiny.config("dpo", objectives=tiny.OBJECTIVES[:1], conditions={"responses": None, "per_prompt": 1})
    config["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    config["training"] |= {"max_steps": 1}
    return config | {"template": {"prompt": "chat"}, "data": {"train": [path], "eval": [path]}}


def test_rows_that_fail_are_named(recipe, tmp_path):
    with pytest.raises(DataError, match="r.jsonl:2: TemplateError: System role not supported"):
        train(recipe)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(DataError, match="r.jsonl:2: TemplateError: System role not supported"):
        count([str(tmp_path / "recipe.yaml")])


def test_rows_that_fail_are_skipped_and_counted(recipe, tmp_path, capsys):
    recipe["data"] |= {"on_bad_line": "skip"}
    report = train(recipe | {"run_dir": str(tmp_path / "run")}).report
    assert report["bad_lines"] == 4  # two of each split
    assert [reason.split(": ")[0][-1] for reason in report["bad_line_reasons"]] == ["2", "4", "2", "4"]
    assert report["train"]["units"] == 3 and report["train"]["pairs"] == 3  # a, c, and d with its other answers
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert count([str(tmp_path / "recipe.yaml")]) == 0
    assert "bad rows skipped: 4; the first: " in capsys.readouterr().out
    out = ["--out", str(tmp_path / "eval.json"), "--condition", "honesty=5", "--max-new-tokens", "1"]
    assert evaluate([str(tmp_path / "run"), *out]) == 0  # what was held out holds none of them
    assert evaluate([str(tmp_path / "run"), "--data", recipe["data"]["train"][0], *out]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["report"]["bad_lines"] == 2
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "b?"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ("a?", system)))
    with pytest.raises(DataError, match="p.jsonl:2: TemplateError: System role not supported"):
        evaluate([str(tmp_path / "run"), "--prompts", str(tmp_path / "p.jsonl"), *out])
    recipe["data"]["train"] = recipe["data"]["eval"] = [str(tmp_path / "bad.jsonl")]
    (tmp_path / "bad.jsonl").write_text((tmp_path / "r.jsonl").read_text().splitlines()[1])
    with pytest.raises(ValueError, match="the chat template or tokenizer fails on every row; the first: .*bad.jsonl:1"):
        train(recipe)
