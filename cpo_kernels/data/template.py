"""Prompt, tags and response as text and tokens: one place for training and evaluation."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_kernels.data.records import Prompt, prompt_json
from cpo_kernels.objectives import Objective, TagTemplate
from cpo_kernels.training.keys import TemplateConfig


class PromptTemplate:
    """Token ids of (prompt, condition) and of a response, which ends with the tokenizer's end token.

    Prompt and response are encoded apart, so the boundary between them is the one that generation sees.
    """

    def __init__(self, tokenizer: Any, config: TemplateConfig, objectives: Sequence[Objective]):
        self.tokenizer, self.config = tokenizer, config
        self.tags = TagTemplate(objectives, config.tags)
        fields = [field for _, field, _, _ in string.Formatter().parse(config.prompt) if field is not None]
        if config.prompt != "chat" and sorted(fields) != ["prompt", "tags"]:
            raise ValueError(f"template.prompt must hold {{tags}} and {{prompt}} once each, got {config.prompt!r}")
        if config.prompt == "chat" and not tokenizer.chat_template:
            raise ValueError("template.prompt: chat needs a tokenizer with a chat template; this one has none")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token_id); responses could not end")

    def tagged(self, prompt: Prompt, condition: Mapping[str, float] | None) -> Prompt:
        """The prompt with the condition's tags before it; in a conversation before the user's last message, the one to
        be answered. No condition, no tags (which means best on everything)."""
        tags = self.tags.render(condition or {})
        if isinstance(prompt, str):
            return tags + prompt
        role, text = prompt[-1]
        return (*prompt[:-1], (role, tags + text))

    def text(self, prompt: Prompt, condition: Mapping[str, float] | None = None) -> str:
        """What the model reads before it answers."""
        if self.config.prompt != "chat":
            if not isinstance(prompt, str):
                raise ValueError(f"template.prompt {self.config.prompt!r} has no place for earlier messages: use chat")
            return self.config.prompt.format(tags=self.tags.render(condition or {}), prompt=prompt)
        tagged = self.tagged(prompt, condition)
        messages = prompt_json((("user", tagged),) if isinstance(tagged, str) else tagged)
        if self.config.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.config.system})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def prompt_ids(self, prompt: Prompt, condition: Mapping[str, float] | None = None) -> list[int]:
        special = self.config.prompt != "chat"  # a chat template writes its own special tokens
        return self.tokenizer(self.text(prompt, condition), add_special_tokens=special)["input_ids"]

    def response_ids(self, response: str) -> list[int]:
        text = self.config.answer_prefix + response
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]
