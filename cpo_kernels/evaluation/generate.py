"""Greedy answers, in batches of left-padded prompts with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from tqdm import tqdm

from cpo_kernels.data.records import Prompt
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.training.models import learned_positions


@torch.no_grad()
def greedy_answers(
    model: Any,
    template: PromptTemplate,
    requests: Sequence[tuple[Prompt, Mapping[str, float] | None]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
) -> list[str]:
    """The greedy answer to every (prompt, condition), without the template's answer prefix and outer blanks.

    A condition of None or {} shows no tags. An answer ends at any of `template.end_ids`. The model runs in the dtype of
    its parameters. `stop` is called after every token; once it returns True the answers end where they are.
    """
    tokenizer, device = template.tokenizer, next(model.parameters()).device
    pad: int = template.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts = [template.prompt_ids(prompt, condition) for prompt, condition in requests]
    ends = template.end_ids(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    answers = [""] * len(prompts)
    longest, limit = max(map(len, prompts), default=0), learned_positions(model)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {max_new_tokens} exceed the {limit} positions that the "
            "model has embeddings of: use shorter prompts, or fewer max_new_tokens"
        )
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), "generate", disable=not progress, leave=False):
        part = order[start : start + batch_size]
        longest = len(prompts[part[-1]])
        input_ids = torch.full((len(part), longest), pad)
        mask = torch.zeros(len(part), longest, dtype=torch.long)
        for row, i in enumerate(part):
            input_ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=pad,
            stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), stop(), device=device)]
            if stop
            else None,
        )
        answered = [list(takewhile(lambda i: i not in ends, ids)) for ids in output[:, longest:].tolist()]
        texts = tokenizer.batch_decode(answered, skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text.removeprefix(template.config.answer_prefix).strip()
    model.train(was_training)
    return answers
