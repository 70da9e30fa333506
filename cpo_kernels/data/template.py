"""Prompt, tags and response as text and tokens, for training and evaluation alike."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_kernels.data.records import (
    OPTIONS,
    DataError,
    Message,
    Prompt,
    Response,
    message_json,
    prompt_json,
    prompt_text,
    short,
)
from cpo_kernels.objectives import Objective, TagTemplate
from cpo_kernels.recipe.keys import TemplateConfig

RESERVED = ("tokenize", "add_generation_prompt", "continue_final_message", "chat_template")
ANSWER = "an answer"  # of a conversation that shows how the chat template ends one


def check_prompt(tokenizer: Any, config: TemplateConfig) -> None:
    """Raise ValueError for an impossible `template.prompt`, before data and model are read."""
    if config.prompt == "chat":
        if not tokenizer.chat_template:
            raise ValueError(
                "template.prompt: chat needs a tokenizer with a chat template; this one has none: give another "
                "with --model.tokenizer FOLDER, or a text prompt with --template.prompt '{tags}{prompt}'"
            )
        return
    fields = [field for _, field, _, _ in string.Formatter().parse(config.prompt) if field is not None]
    if sorted(fields) != ["prompt", "tags"]:
        raise ValueError(f"template.prompt must contain {{tags}} and {{prompt}} once each, got {config.prompt!r}")


class PromptTemplate:
    """Token ids of a prompt under a condition and of its responses.

    Prompt and response are encoded as one text, as in TRL: what a tokenizer adds at the start of a text (a dummy
    prefix) or at its end (an end token of its own) never appears between them. A response ends with the chat
    template's end of turn, or with `tokenizer.eos_token` if the prompt is a text of the config or the template writes
    no end token.
    """

    def __init__(self, tokenizer: Any, config: TemplateConfig, objectives: Sequence[Objective]):
        self.tokenizer, self.config = tokenizer, config
        self.tags = TagTemplate(objectives, config.tags)
        self.chat = config.prompt == "chat"
        check_prompt(tokenizer, config)
        # what follows an answer, as far as its end token; what then follows; that token
        self.closing, self.after, end = self._end_of_turn() if self.chat else ("", "", None)
        self.closed = end is not None  # by the chat template
        end = tokenizer.eos_token_id if end is None else end
        if end is None:
            raise ValueError("the tokenizer has no end token (eos_token_id), so responses could not end")
        self.end_id: int = end
        tokens = tokenizer.added_tokens_decoder if self.chat and getattr(tokenizer, "is_fast", False) else {}
        whole = {i: t for i, t in tokens.items() if t.special and not (t.normalized or t.single_word)}
        self.cuts = {str(token): i for i, token in whole.items()}

    # ---------------------------------------------------------------- text

    def tagged(self, prompt: Prompt, condition: Mapping[str, float] | None) -> Prompt:
        """The prompt with the condition's tags before it; in a conversation, before the user's last message, the one to
        answer. Without a condition there are no tags (which means best on everything)."""
        tags = self.tags.render(condition or {})
        if isinstance(prompt, str):
            return tags + prompt
        last = max(i for i, message in enumerate(prompt) if message[0] == "user")
        role, text, *extra = prompt[last]
        return (*prompt[:last], (role, tags + text, *extra), *prompt[last + 1 :])

    def text(self, prompt: Prompt, condition: Mapping[str, float] | None = None) -> str:
        """The text that the model reads before it answers."""
        if self.chat:
            options, messages = self._conversation(prompt, condition)
            return self._render(messages, options, add_generation_prompt=True)
        if not isinstance(prompt, str):
            raise ValueError(
                f"template.prompt {self.config.prompt!r} has no place for earlier messages: use chat, for "
                f"{short(prompt_json(prompt))}"
            )
        return self.config.prompt.format(tags=self.tags.render(condition or {}), prompt=prompt)

    def _whole(self, before: str, prompt: Prompt, condition: Mapping[str, float] | None, response: Response) -> str:
        """The prompt, whose own text is `before`, with the response, up to the end token if the chat template writes
        one."""
        said = self.config.answer_prefix + response.text
        if not self.chat:
            if response.extra:
                raise ValueError(f"template.prompt {self.config.prompt!r} has no place for {response.extra}: use chat")
            return before + said
        options, messages = self._conversation(prompt, condition)
        ended = self.closing.lstrip()
        said = said.removesuffix(ended) if ended else said
        text = self._render([*messages, ("assistant", said, *filter(None, [response.extra]))], options)
        if text.endswith(self.closing + self.after):
            return text[: len(text) - len(self.after)]
        if self.closed and text.rstrip().endswith(tuple(self._added().values())):
            return text.rstrip()  # another end: Llama 3.1 writes <|eom_id|> after a tool's call
        raise ValueError(
            f"the chat template ends this answer with {text[-20:]!r} but others with {self.closing + self.after!r}"
        )

    def _check_begun(self, texts: Sequence[str], prompt: Prompt, condition: Mapping[str, float] | None) -> None:
        """Raise ValueError if the prompt's own text, the first of `texts`, differs from the text before an answer:
        all from the first difference on, including the user's words, would count as the response."""
        before, common = texts[0], os.path.commonprefix(list(texts))
        if not self.chat or len(common) == len(before):
            return
        options, messages = self._conversation(prompt, condition)
        asked = os.path.commonprefix([before, self._render(messages, options)])  # without what begins an answer
        ends = tuple(self._added().values())
        while (shorter := asked.rstrip()) != asked or asked.endswith(ends):  # ... and what ends the last turn
            asked = shorter if shorter != asked else asked[: -max(len(end) for end in ends if asked.endswith(end))]
        if len(common) < len(asked):
            raise ValueError(
                f"the chat template writes {short(asked[len(common) :])} of this prompt differently if an answer "
                "follows: use a template that writes the prompt the same way in both cases"
            )

    def _conversation(
        self, prompt: Prompt, condition: Mapping[str, float] | None
    ) -> tuple[dict[str, Any], list[Message]]:
        tagged = self.tagged(prompt, condition)
        messages: list[Message] = [("user", tagged)] if isinstance(tagged, str) else list(tagged)
        options = message_json(*messages.pop(0)) if messages[0][0] == OPTIONS else {}
        if self.config.system and messages[0][0] != "system":
            messages.insert(0, ("system", self.config.system))
        return options, messages

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any], **keys: Any) -> str:
        """The chat template's text. Raises ValueError if it leaves out part of the row."""
        given = [message_json(*message) for message in messages]
        row = {"tools": options["tools"]} if "tools" in options else {}
        row |= options.get("chat_template_kwargs", {})
        source = str(self.tokenizer.chat_template)
        for name in row:
            if name in RESERVED or name not in source:
                raise ValueError(
                    f"the chat template does not take {name} from a row: use one that does, or add the column to "
                    "data.fields.ignore"
                )

        def render(given: list[dict[str, Any]]) -> str:
            text: str = self.tokenizer.apply_chat_template(given, tokenize=False, **keys, **row)
            return text

        text = render(given)
        for i, message in enumerate(given):
            said = [name for name in message if name not in ("role", "content")]
            plain = message["role"] in ("user", "assistant") and not said
            if i < len(given) - 1:  # of earlier turns a template may drop what it knows: a thought, say
                reads = r"\bm\w*(\[[^]]*\])?(\.|\[['\"]|\.get\(['\"])"
                said = [name for name in said if not re.search(rf"{reads}{re.escape(name)}\b", source)]
            if message["content"].strip() and not (plain and message["content"].strip() in text):
                said.append("content")
            for name in said:
                other = {k: v for k, v in message.items() if k != name}
                other |= {name: message[name] + ANSWER} if name == "content" else {}
                try:
                    lost = render([*given[:i], other, *given[i + 1 :]]) == text
                except Exception:  # it reads what is not there now
                    lost = False
                if lost:
                    instead = "remove it from the row" if name == "content" else f"add {name} to data.fields.ignore"
                    raise ValueError(
                        f"the chat template leaves out {name} {short(message[name])} of the {message['role']} "
                        f"message: use a template that writes it, or {instead}"
                    )
        return text

    def _end_of_turn(self) -> tuple[str, str, int | None]:
        """(what the chat template writes after an answer up to its end token, what it writes after that, the token)."""
        try:
            text = self._render([("user", "a question"), ("assistant", ANSWER)], {})
        except Exception as error:  # chat templates raise what they like
            raise ValueError(f"the tokenizer's chat template fails on a question with an answer: {error}") from error
        _, answer, tail = text.rpartition(ANSWER)
        if not answer:
            raise ValueError("the tokenizer's chat template omits the assistant's answers: use one that writes them")
        tokens = {text: token for token, text in self._added().items() if text in tail}
        if not tokens:
            return "", tail, None
        first = min(tokens, key=lambda text: (tail.index(text), -len(text)))
        end, last = tail.index(first) + len(first), first
        while following := [text for text in tokens if tail.startswith(text, end)]:  # Cohere's end in two tokens
            last = max(following, key=len)
            end += len(last)
        return tail[:end], tail[end:], tokens[last]

    def _added(self) -> dict[int, str]:
        """The added tokens outside the base vocabulary, such as <end_of_turn>, and their texts."""
        added = {token: str(text) for token, text in self.tokenizer.added_tokens_decoder.items()}
        return {token: text for token, text in added.items() if text.strip()}

    # ---------------------------------------------------------------- tokens

    def prompt_ids(self, prompt: Prompt, condition: Mapping[str, float] | None = None) -> list[int]:
        """The token ids that the model reads before it answers."""
        return self._ids([self.text(prompt, condition)])[0]

    def encode(
        self, prompt: Prompt, condition: Mapping[str, float] | None, responses: Sequence[Response], place: str = ""
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], bool]:
        """(ids of the prompt, ids of each response, whether the prompt's are `prompt_ids`).

        Prompt and response together are the ids of the whole text. These may not start with the ids of the prompt
        alone: tokens merge at the boundary, or the chat template writes a prompt differently before an answer. Then the
        responses begin where the first of them departs from the prompt alone, as in TRL, so that all share one prompt.

        Raises DataError with the row (`place`, or the response's) on which the chat template or tokenizer fails.
        """
        response = None
        try:
            before = self.text(prompt, condition)
            texts = [before]
            for response in responses:
                texts.append(self._whole(before, prompt, condition, response))
            response = None
            self._check_begun(texts, prompt, condition)
            alone, *wholes = self._ids_of_one_prompt(texts)
        except Exception as error:  # they raise what they like
            place = (response or next(iter(responses), Response(""))).place or place or short(prompt_text(prompt))
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise DataError(f"{place}: {kind}{error}") from error
        wholes = [self._ended(ids, alone) for ids in wholes]
        lengths = [_common_prefix(alone, whole) for whole in wholes]
        if 0 in lengths:
            place = responses[lengths.index(0)].place or place or short(prompt_text(prompt))
            raise DataError(
                f"{place}: prompt {short(before)} and response become one token at the start of the text: set "
                "template.answer_prefix or template.prompt to separate them"
            )
        shared = min(lengths, default=len(alone))
        return tuple(alone[:shared]), tuple(tuple(whole[shared:]) for whole in wholes), shared == len(alone)

    def _ended(self, ids: list[int], prompt: list[int]) -> list[int]:
        """`ids` with one end token; one at the end of the prompt does not count."""
        said = ids[_common_prefix(prompt, ids) :]
        return ids if self.closed or said[-1:] == [self.end_id] else [*ids, self.end_id]

    def _ids_of_one_prompt(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts with a common beginning, the first of them the prompt. A tokenizer splits a text at special
        tokens before anything else, so the text before the last special token that all texts share is encoded once."""
        common = os.path.commonprefix(texts)
        cut = max((common.rfind(token) for token in self.cuts), default=-1)
        if cut <= 0 or len(texts) < 2:
            return self._ids(texts)
        prompt, tail, *tails = self._ids([texts[0], *(text[cut:] for text in texts)])
        start = len(prompt) - len(tail)
        if prompt[start:] != tail or tail[0] not in self.cuts.values():
            return self._ids(texts)
        return [prompt, *(prompt[:start] + ids for ids in tails)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts with the tokenizer's start of a text exactly once (a chat template writes its own). What the
        tokenizer appends to a text is left out, since more follows."""
        if self.chat:
            ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            return ids
        encoded = self.tokenizer(texts, return_special_tokens_mask=True, verbose=False)
        return [_begun_once(*both) for both in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)]

    def end_ids(self, model: Any) -> list[int]:
        """The token ids that end an answer: the template's, the tokenizer's and those of the model's generation
        config."""
        config = getattr(model, "generation_config", None)
        given = config.eos_token_id if config is not None else None
        given = given if isinstance(given, (list, tuple)) else [given]
        return list(dict.fromkeys(i for i in (*given, self.tokenizer.eos_token_id, self.end_id) if i is not None))

    def set_end(self, model: Any) -> None:
        """Make `model.generate` end answers where training ends them."""
        if getattr(model, "generation_config", None) is not None:
            ends = self.end_ids(model)
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _begun_once(ids: list[int], added: list[int]) -> list[int]:
    """`ids` without what the tokenizer added (1 in `added`) after the text, or before a text that already begins with
    it."""
    end = next((i for i in range(len(ids), 0, -1) if not added[i - 1]), 0)
    start = next((i for i in range(end) if not added[i]), end)
    return ids[start if start and ids[start : 2 * start] == ids[:start] else 0 : end]
