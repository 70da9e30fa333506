"""The chat template that a model is saved with: in transformers' own engine it writes what the model was trained on."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, pipeline

from cpo_kernels.data.chat_template import argument, level_template
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.loading import find_model, load
from cpo_kernels.objectives import Objective
from cpo_kernels.play.server import Player
from cpo_kernels.recipe.keys import TemplateConfig
from cpo_kernels.training.loop import train
from tests.data.test_template import TOKENIZERS
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401
from tests.support.tokenizers_at_odds import CHATML, GEMMA

OBJECTIVES = [Objective("honesty", 1, 5), Objective("help-fulness", 0, 1), Objective("tools", -2.5, 1e16)]
CONDITIONS = [
    {},
    {"honesty": 5.0},
    {"honesty": 2.5, "help-fulness": 0.0},
    {"help-fulness": 1 / 3, "tools": -2.5},
    {"tools": 10.0},
]
CONVERSATION = (("user", "Sky?"), ("assistant", "blue"), ("user", "Why? <b> {{ 1 }}"))
TEXTS = ["{tags}Q: {prompt}\nA:", '{prompt} "\\ é\U0001f600 {{{{ x }}}} %s {tags}\n', "<s>{tags}{prompt} "]


def made(tokenizer, prompt, **keys):
    return PromptTemplate(tokenizer, TemplateConfig(prompt, **keys), OBJECTIVES)


def messages(prompt):
    return [{"role": role, "content": text} for role, text in prompt]


def levels(condition):
    return {argument(name): level for name, level in condition.items()}


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
@pytest.mark.parametrize("system", [None, 'Be "nice".'])
@pytest.mark.parametrize("source", [CHATML, "\n  " + CHATML, "  {% if true %}x{% endif %}" + CHATML])
def test_the_base_template_with_tags(source, system, condition):
    """Before the user's last message; the base's text stays as it is, white space at its start too."""
    tokenizer = TOKENIZERS["byte level"](source)
    template = made(tokenizer, "chat", system=system)
    wants = [template.text(prompt, condition) for prompt in (CONVERSATION, "Sky?", (("system", "S"), ("user", "U")))]
    tokenizer.chat_template = saved = level_template(template, OBJECTIVES)
    for prompt, want in zip((CONVERSATION, (("user", "Sky?"),), (("system", "S"), ("user", "U"))), wants, strict=True):
        text = tokenizer.apply_chat_template(
            messages(prompt), tokenize=False, add_generation_prompt=True, **levels(condition)
        )
        assert text == want
    again = made(tokenizer, "chat", system=system)  # a later stage trains from the saved model
    assert [again.text(p, condition) for p in (CONVERSATION, "Sky?", (("system", "S"), ("user", "U")))] == wants
    assert level_template(again, OBJECTIVES) == saved
    parts = [{"role": "user", "content": [{"type": "text", "text": "Sky?"}]}]
    tokenizer.chat_template = saved.replace("m.content", "(m.content if m.content is string else m.content[0].text)")
    if condition:  # OpenAI's parts: the tags are a part of their own
        text = tokenizer.apply_chat_template(parts, tokenize=False, **levels(condition))
        assert f"user\n{template.tags.render(condition)}<|im_end|>" in text


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("prompt", TEXTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_recipe_s_text_as_a_template(kind, prompt, begins):
    """The ids are those of training: a BOS that the tokenizer adds is written by the template, but never twice."""
    tokenizer = TOKENIZERS[kind](begins=begins)
    template = made(tokenizer, prompt, answer_prefix=" ")
    tokenizer.chat_template = level_template(template, OBJECTIVES)
    for condition in CONDITIONS:
        for asked in ("Sky?", 'a "b" \\ {{ c }}\n'):
            turn = [{"role": "user", "content": asked}]
            ids = tokenizer.apply_chat_template(turn, return_dict=True, **levels(condition))["input_ids"]
            assert ids == template.prompt_ids(asked, condition)
            parts = [{"role": "user", "content": [{"type": "text", "text": asked}]}]
            assert tokenizer.apply_chat_template(parts, return_dict=True, **levels(condition))["input_ids"] == ids
    both = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "blue"}]
    text = tokenizer.apply_chat_template(both, tokenize=False)
    assert text.endswith(" blue<eos>") and text.startswith(tokenizer.apply_chat_template(both[:1], tokenize=False))
    for wrong in ([{"role": "system", "content": "S"}, both[0]], [*both, both[0]]):
        with pytest.raises(TemplateError, match="single questions: give one user message"):
            tokenizer.apply_chat_template(wrong, tokenize=False)


@pytest.mark.parametrize("level", [0, 5.5, "5", True, float("nan"), float("inf"), [5]])
@pytest.mark.parametrize("prompt", ["chat", TEXTS[0]])
def test_the_template_refuses_what_is_no_level(prompt, level):
    tokenizer = TOKENIZERS["byte level"](GEMMA)
    tokenizer.chat_template = level_template(made(tokenizer, prompt), OBJECTIVES)
    with pytest.raises(TemplateError, match="honesty must be a number from 1 to 5, got "):
        tokenizer.apply_chat_template(messages(CONVERSATION[:1]), tokenize=False, honesty=level)
    assert "<honesty" not in tokenizer.apply_chat_template(messages(CONVERSATION[:1]), tokenize=False, honesty=None)


def test_names_that_are_no_arguments():
    assert [argument(o.name) for o in OBJECTIVES] == ["honesty", "help_fulness_level", "tools_level"]
    assert [argument(name) for name in ("messages", "not", "é", "padding")] == [
        "messages_level", "not_level", "__level", "padding_level",
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["chat", TEXTS[0]])
def test_a_trained_model_is_used_like_any_other(tmp_path, prompt):
    """AutoTokenizer, transformers' pipeline and the page read one text; a baseline without tags takes no level."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
    for stage in ("cpsft", "sft"):
        keys = {"run_dir": str(tmp_path / stage), "template": {"prompt": prompt}, "training": {"max_steps": 1}}
        result = train(tiny.config(stage, **keys), tokenizer=tokenizer, records=tiny.records())
    assert tokenizer.chat_template.startswith("{% for m")  # the caller's is left alone
    saved = AutoTokenizer.from_pretrained(tmp_path / "cpsft" / "model")
    turn, asked = [{"role": "user", "content": "say ab"}], {"honesty": 5, "helpfulness": 1}
    text = saved.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **asked)
    assert "<honesty: 5> <helpfulness: 1> " in text
    model, template = load(find_model(str(tmp_path / "cpsft")))
    assert Player("x", model, template, 4).generate("", "say ab", asked, 4)["read"] == text
    answering = pipeline("text-generation", model=str(tmp_path / "cpsft" / "model"), device="cpu")
    options = {"max_new_tokens": 4, "do_sample": False}
    (answer,) = answering(turn, tokenizer_encode_kwargs=asked, **options)
    want = answering(text, return_full_text=False, add_special_tokens=False, **options)[0]["generated_text"]
    assert answer["generated_text"][-1] == {"role": "assistant", "content": want}
    with pytest.raises(TemplateError, match="honesty must be a number from 1 to 5, got 9"):
        answering(turn, tokenizer_encode_kwargs={"honesty": 9}, **options)
    plain = AutoTokenizer.from_pretrained(tmp_path / "sft" / "model")
    assert "<honesty" not in plain.apply_chat_template(turn, tokenize=False, **asked)
    assert json.loads((tmp_path / "sft/model/tokenizer_config.json").read_text()) and result.tokenizer is tokenizer


def test_a_server_takes_levels_from_a_request(tmp_path):
    """`transformers serve`, a server with OpenAI's interface: it reads the tags, and refuses what is no level."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
    keys = {"run_dir": str(tmp_path / "run"), "template": {"prompt": "chat"}, "training": {"max_steps": 1}}
    template = train(tiny.config("cpsft", **keys), tokenizer=tokenizer, records=tiny.records()).template
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    model = str(tmp_path / "run" / "model")
    command = [sys.executable, "-c", program, "serve", "--device", "cpu", "--port", str(port), model]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def ask(path, **body):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

    try:
        for _ in range(240):
            try:
                ask("/health")
                break
            except OSError:
                assert server.poll() is None, server.stderr.read()[-2000:]
                time.sleep(0.5)
        turn = {"model": model, "messages": [{"role": "user", "content": "say ab"}], "max_tokens": 2}
        for condition in ({}, {"honesty": 5}, {"honesty": 5, "helpfulness": 1}):
            reply = ask("/v1/chat/completions", **turn, chat_template_kwargs=condition)
            assert reply["usage"]["prompt_tokens"] == len(template.prompt_ids("say ab", condition))
        with pytest.raises(urllib.error.HTTPError):
            ask("/v1/chat/completions", **turn, chat_template_kwargs={"honesty": 9})
    finally:
        server.terminate()
        assert "honesty must be a number from 1 to 5, got 9" in server.communicate()[1]
