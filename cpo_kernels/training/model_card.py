"""The README.md of a trained model: how to request levels, what it was trained on, its last metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpo_kernels.data.chat_template import argument
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.objectives import Objective, format_number
from cpo_kernels.recipe.keys import ConditionsConfig, Config

STAGES = {
    "cpsft": "Supervised fine-tuning on responses under their actual ratings (CPSFT).",
    "cdpo": "Preference optimization on pairs ordered under the condition in their prompt (CDPO).",
    "sft": "Supervised fine-tuning on the best responses, without conditions.",
    "dpo": "Preference optimization on pairs ordered only by the ratings, without conditions.",
}
CONDITIONED = ("cpsft", "cdpo")
QUESTION = "Who was Ada Lovelace?"


def model_card(
    config: Config,
    template: PromptTemplate,
    objectives: Sequence[Objective],
    metrics: Sequence[dict[str, Any]],
    merged_into: str | None = None,
) -> str:
    """`merged_into`: the base model of the adapters that the run started from."""
    base = config.model.name or "from scratch"
    if merged_into:
        base += f", adapters, merged into {merged_into} before training"
    sources = [source.path for source in config.data.train] or ["records given to train()"]
    lines = ["---", "library_name: transformers", "tags: [controllable-preference-optimization]"]
    if config.model.name and not config.model.name.startswith("package:"):
        lines.append(f"base_model: {config.model.name}")
    lines += ["---", "", "# A model that follows ratings", "", STAGES[config.stage]]
    lines.append(
        "Method: Controllable Preference Optimization, Guo et al. 2024, "
        "[arXiv 2402.19085](https://arxiv.org/abs/2402.19085)."
    )
    if config.stage in CONDITIONED:
        lines += tag_lines(template, objectives, config.conditions)
    lines += ["", "## Use", "", "```python", *example(objectives, config.stage), "```"]
    if config.model.quantize:
        base += ", with 4-bit weights (NF4, double quantization); this folder holds adapters for it"
    lines += ["", "## Training", "", f"- base: {base}", f"- data: {', '.join(sources)}", f"- stage: {config.stage}"]
    lines.append("- every key of the run: config.yaml of the run directory")
    for row in [row for row in metrics if "eval_loss" in row][-1:]:
        figures = ", ".join(f"{name.removeprefix('eval_')} {x:.4g}" for name, x in row.items() if name != "step")
        lines.append(f"- held-out prompts after step {row['step']}: {figures}")
    return "\n".join(lines) + "\n"


def tag_lines(template: PromptTemplate, objectives: Sequence[Objective], conditions: ConditionsConfig) -> list[str]:
    untagged = conditions.strip_best > 0 or any(mix.sampler == "none" for mix in conditions.mixture)
    lines = ["", "## Levels", "", "The chat template takes a level for each objective; each is optional."]
    lines += [
        "Without any level the model aims for the best on everything."
        if untagged
        else "It was trained with tags on every prompt: for the best on everything, request each best level.",
        "The template writes levels as tags, plain text before the request:",
        "",
        "| objective | from | to | argument | tag |",
        "|---|---|---|---|---|",
    ]
    for o in objectives:
        ends = " | ".join(format_number(level) for level in (o.low, o.high))
        best = template.tags.render({o.name: o.high}).strip()
        lines.append(f"| {o.name} | {ends} | `{argument(o.name)}={format_number(o.high)}` | `{best}` |")
    given = ", ".join(f'"{argument(o.name)}": {format_number(o.high)}' for o in objectives)
    lines += [
        "",
        "Servers that support `chat_template_kwargs` (`transformers serve`, vLLM) take levels in a request:",
    ]
    lines += [f'`"chat_template_kwargs": {{{given}}}`.']
    return lines


def example(objectives: Sequence[Objective], stage: str) -> list[str]:
    """Python code that loads its own folder and answers a question, with levels if the model takes them."""
    asked = {o.name: o.low if i else o.high for i, o in enumerate(objectives)} if stage in CONDITIONED else {}
    levels = "".join(f", {argument(name)}={format_number(level)}" for name, level in asked.items())
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # the folder of this file',
        "tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)",
        f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
        'options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
        f"inputs = tokenizer.apply_chat_template(messages{levels}, **options)",
        "output = model.generate(**inputs, max_new_tokens=100)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
