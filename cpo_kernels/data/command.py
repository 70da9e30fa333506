"""`cpo-kernels data RECIPE`: statistics and examples of what the recipe would train on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpo_kernels.data.arguments import parser
from cpo_kernels.data.conditions import Draws, Group, ratings_row
from cpo_kernels.data.packing import encode
from cpo_kernels.data.preparation import check_sources, draws_of, encodable, load_data
from cpo_kernels.data.records import message_json, prompt_columns
from cpo_kernels.data.sources import notes
from cpo_kernels.data.statistics import condition_name, pair_gaps, statistics, table
from cpo_kernels.data.template import PromptTemplate, check_prompt
from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.objectives import Objective, value
from cpo_kernels.recipe.config import read_config


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(argv))


def run(args: Any) -> int:
    config = read_config(args.config, args.overrides)
    report: dict[str, Any] = {}
    check_sources(config.data)
    tokenizer = load_tokenizer(config.model)  # before the data, which takes longer
    check_prompt(tokenizer, config.template)
    records, held_out, objectives = load_data(
        config, None, None, report, quiet=args.quiet or not config.training.progress
    )
    template = PromptTemplate(tokenizer, config.template, objectives)
    records = encodable(config.data, records, template, report)
    held_out = encodable(config.data, held_out, template, report, may_be_empty=True)
    draws = draws_of(config, records, objectives)
    units = encode(draws, template, objectives, config.data.max_prompt_tokens, config.data.max_tokens)
    summary = statistics(records, draws, units, objectives) | report | {"held_out_records": len(held_out)}
    print(table(summary))
    for note in notes(summary):
        print(note)
    for text in previews(draws, template, objectives, args.preview, config.seed):
        print(f"\n{text}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "statistics.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_examples(draws, template, objectives, args.out / "examples.jsonl")
        print(f"\nwritten: {args.out / 'statistics.json'}, {args.out / 'examples.jsonl'}")
    return 0


def previews(
    draws: Draws, template: PromptTemplate, objectives: Sequence[Objective], number: int, seed: int
) -> list[str]:
    """Random groups as text: the prompt with its tags, then the responses, best first."""
    groups = [group for unit in draws.units for group in unit]
    chosen = random.Random(seed).sample(groups, min(number, len(groups)))
    return [preview(group, template, objectives) for group in chosen]


def preview(group: Group, template: PromptTemplate, objectives: Sequence[Objective]) -> str:
    lines = [f"--- condition: {condition_name(group.condition)}; {len(group.pairs)} pairs"]
    lines.append(template.text(group.prompt, group.tags))
    scores = [ratings_row(r.ratings, objectives) for r in group.responses]
    worth = value(scores, ratings_row(group.condition, objectives), objectives).tolist()
    for w, response in sorted(
        zip(worth, group.responses, strict=True), key=lambda item: (item[0] != item[0], -item[0])
    ):
        rated = condition_name(response.ratings)
        lines.append(f"--- R {w:.2f} ({rated}): {template.config.answer_prefix}{response.text}{response.extra}")
    return "\n".join(lines)


def write_examples(draws: Draws, template: PromptTemplate, objectives: Sequence[Objective], path: Path) -> None:
    """One pair a row in TRL's preference format, or one response a row where the stage has no pairs."""
    with open(path, "w", encoding="utf-8") as file:
        for group in (group for unit in draws.units for group in unit):
            prompt = prompt_columns(template.tagged(group.prompt, group.tags)) | {"condition": group.condition}
            texts: list[Any] = [response.text for response in group.responses]
            if not isinstance(prompt["prompt"], str):  # TRL wants messages on both sides
                texts = [[message_json("assistant", r.text, r.extra)] for r in group.responses]
            rows: list[dict[str, Any]] = [{"completion": texts[0]}]
            if group.pairs:
                pairs = zip(group.pairs, pair_gaps(group, objectives).tolist(), strict=True)
                ordered = [(a, b) if gap > 0 else (b, a) for (a, b), gap in pairs]
                rows = [{"chosen": texts[chosen], "rejected": texts[rejected]} for chosen, rejected in ordered]
            file.writelines(json.dumps(prompt | row, ensure_ascii=False) + "\n" for row in rows)
