"""The chat template that is saved with a trained model. It takes levels: `apply_chat_template(messages, honesty=5)`.

Levels become the tags that the model was trained with, placed before the user's last message; without a level there is
no tag. The template itself rejects a level that is not a number on the objective's scale, so servers reject it too.
OpenAI-compatible servers pass levels as `chat_template_kwargs`.
"""

from __future__ import annotations

import json
import keyword
import re
import string
from collections.abc import Sequence

from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.objectives import Objective, format_number

BEGIN = "{#- Levels as tags, by cpo-kernels; the model's own template follows. -#}\n"
END = "{%- set messages = cpo.turns %}\n"  # a block tag's newline is not written
# Names that already mean something in transformers' `apply_chat_template`, in Jinja or in common templates.
RESERVED = (
    "add_generation_prompt chat_template continue_final_message conversation cpo documents enable_thinking loop "
    "max_length messages namespace padding processor_kwargs range return_assistant_tokens_mask return_dict "
    "return_tensors tokenize tokenizer_kwargs tools truncation"
).split()
TAGS = """{%%- set cpo = namespace(tags='', last=-1, turns=[]) -%%}
{%%- for name, level, before, after, low, high in [%s] -%%}
  {%%- if level is not none -%%}
    {%%- if level is boolean or level is not number or not (level >= low and level <= high) -%%}
      {{- raise_exception(name ~ ' must be a number from ' ~ low ~ ' to ' ~ high ~ ', got ' ~ level) -}}
    {%%- endif -%%}
    {%%- set cpo.tags = cpo.tags ~ before ~ (level|int if level == level|int else level) ~ after -%%}
  {%%- endif -%%}
{%%- endfor -%%}
"""
SYSTEM = """{%%- if messages[0]['role'] != 'system' -%%}
  {%%- set messages = [{'role': 'system', 'content': %s}] + messages -%%}
{%%- endif -%%}
"""
TURNS = """{%- for turn in messages -%}
  {%- if turn['role'] == 'user' -%}{%- set cpo.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for turn in messages -%}
  {%- if loop.index0 != cpo.last or not cpo.tags -%}
    {%- set cpo.turns = cpo.turns + [turn] -%}
  {%- elif turn['content'] is string -%}
    {%- set cpo.turns = cpo.turns + [dict(turn, content=cpo.tags ~ turn['content'])] -%}
  {%- else -%}
    {%- set cpo.turns = cpo.turns + [dict(turn, content=[{'type': 'text', 'text': cpo.tags}] + turn['content'])] -%}
  {%- endif -%}
{%- endfor -%}
"""
ONE_QUESTION = """{%%- for turn in messages -%%}
  {%%- if loop.index0 > 1 or turn['role'] != ['user', 'assistant'][loop.index0] -%%}
    {{- raise_exception('this model was trained on single questions: give one user message') -}}
  {%%- endif -%%}
  {%%- set text = turn['content'] if turn['content'] is string else turn['content']|map(attribute='text')|join -%%}
  {{- %s if loop.first else %s -}}
{%%- endfor -%%}
"""


def argument(name: str) -> str:
    """The template's argument for the level of an objective: the objective's name, if that can be an argument."""
    plain = name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and name not in RESERVED
    return name if plain else re.sub(r"\W", "_", name, flags=re.ASCII) + "_level"


def level_template(template: PromptTemplate, objectives: Sequence[Objective]) -> str:
    """Jinja source: the tags of `objectives`, then the tokenizer's own template or one made of the recipe's text."""
    rows = []
    for o in objectives:
        before, after = template.tags.pattern.format(name=o.name, value="\0").split("\0")
        level = argument(o.name)
        ends = f"{format_number(o.low)}, {format_number(o.high)}"
        rows.append(f"({text(level)}, {level} if {level} is defined else none, {text(before)}, {text(after)}, {ends})")
    tags = TAGS % ", ".join(rows)
    if not template.chat:
        return BEGIN + tags + ONE_QUESTION % prompt_and_answer(template)
    own: str = template.tokenizer.get_chat_template()
    if own.startswith(BEGIN):  # of an earlier stage
        own = own.partition(END)[2]
    if not objectives and not template.config.system:
        return own
    system = SYSTEM % text(template.config.system) if template.config.system else ""
    return BEGIN + tags + system + TURNS + END + own


def prompt_and_answer(template: PromptTemplate) -> tuple[str, str]:
    """(the prompt, an answer) as Jinja expressions."""
    begin = beginning(template)
    parts = [text(begin)] if begin else []
    fields = {"tags": ["cpo.tags"], "prompt": ["text"], None: []}
    for literal, field, _, _ in string.Formatter().parse(template.config.prompt):
        parts += [text(literal)] * bool(literal) + fields[field]
    end = template.tokenizer.decode([template.end_id])
    return " ~ ".join(parts), f"{text(template.config.answer_prefix)} ~ text ~ {text(end)}"


def beginning(template: PromptTemplate) -> str:
    """What the tokenizer puts before a text (BOS), which a chat template must write itself. It includes a blank if the
    tokenizer starts a text with one, but not text after a BOS."""
    tokenizer, asked = template.tokenizer, template.text("a")
    encoded = tokenizer(asked, return_special_tokens_mask=True)
    added: str = tokenizer.decode(encoded["input_ids"][: (encoded["special_tokens_mask"] + [0]).index(0)])
    for begin in ("", added, f"{added} "):
        if template._ids([asked])[0] == tokenizer(begin + asked, add_special_tokens=False)["input_ids"]:
            return begin
    return added


def text(value: str) -> str:
    """A Jinja literal."""
    return json.dumps(value, ensure_ascii=False)
