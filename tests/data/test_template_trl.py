"""The chat templates of models that TRL carries: prompt and answer as its DPO trainer encodes them."""

import json
import os
import re
from pathlib import Path

import pytest

from cpo_kernels.data.records import DataError, Response, message_json
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.recipe.keys import TemplateConfig
from tests.support.tokenizers_at_odds import byte_level

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
PICTURES = ("idefics3", "smolvlm", "llava_next")  # content is a list there
CALL = [{"type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}]


def calls(value):
    return json.dumps({"tool_calls": value})


CONVERSATIONS = [
    ([("user", "Sky?")], ("assistant", "Yes")),
    ([("user", "Sky?")], ("assistant", "\nYes \n")),
    ([("user", "a"), ("assistant", "b"), ("user", "c")], ("assistant", "Yes")),
    ([("system", "Be kind."), ("user", "Sky?")], ("assistant", "Yes")),
    ([("user", "Sky?")], ("assistant", "Yes", json.dumps({"reasoning_content": "It is."}))),
    ([("user", "Sky?")], ("assistant", "", calls(CALL))),
    ([("user", "Sky?"), ("assistant", "", calls(CALL)), ("tool", "blue")], ("assistant", "Yes")),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_of_models_as_trl_encodes_them(name):
    """What differs: an answer ends at its end token, and what the template leaves out, or fails on, is an error."""
    source = TEMPLATES[name]
    tokenizer = byte_level(source)
    special = set(re.findall(r"<\|?[A-Za-z_▁|｜]+\|?>", source)) - set(re.findall(r"</?\w+>", source))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special | {"<end_of_turn>", "<eos>"})})
    if name.startswith(PICTURES):
        with pytest.raises(ValueError, match="chat template fails on a question with an answer"):
            PromptTemplate(tokenizer, TemplateConfig("chat"), [])
        return
    template = PromptTemplate(tokenizer, TemplateConfig("chat"), [])
    for messages, answer in CONVERSATIONS:
        try:
            prompt, (response,), whole = template.encode(tuple(messages), None, [Response(answer[1], {}, *answer[2:])])
        except DataError as error:
            assert messages[0][0] == "system" or any(len(message) > 2 for message in (*messages, answer)), error
            continue
        before = [message_json(*message) for message in messages]
        keys = {"tokenize": True, "return_dict": True}
        alone = tokenizer.apply_chat_template(before, add_generation_prompt=True, **keys)["input_ids"]
        both = tokenizer.apply_chat_template([*before, message_json(*answer)], **keys)["input_ids"]
        length = len(os.path.commonprefix([alone, both]))
        ended = both if template.closed else [*both, tokenizer.eos_token_id]
        assert list(prompt) == both[:length] and whole == (length == len(alone))
        assert list(response) == ended[length:][: len(response)] and response[-1] in tokenizer.added_tokens_decoder
        assert not tokenizer.decode(ended[length:][len(response) :], skip_special_tokens=True).strip()
