"""`cpo-kernels eval RUN...`: judge trained models on held-out questions with human-rated answers.

For every run: relative accuracy of each condition by likelihood (float32, 95% intervals by question); and of greedy
answers the share of no-comment ones, the human ratings of those that match a rated one, and what one tag alone changes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.data.records import Prompt, Record, prompt_json
from cpo_kernels.data.sources import load_records
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.evaluation.greedy import NO_COMMENT, changed_answers, greedy_classes
from cpo_kernels.evaluation.likelihood import (
    fitted,
    paired_gain,
    rating_conditions,
    relative_accuracy,
    score_answers,
)
from cpo_kernels.objectives import Objective
from cpo_kernels.training.adapters import add_adapters
from cpo_kernels.training.config import read_config
from cpo_kernels.training.keys import Config, DataConfig, ModelConfig
from cpo_kernels.training.models import load_model
from cpo_kernels.training.rundir import versions


def evaluate(
    model: Any,
    template: PromptTemplate,
    records: Sequence[Record],
    conditions: Sequence[Mapping[str, float]],
    *,
    rows: str = "shared",
    max_new_tokens: int = 50,
    no_comment: str = NO_COMMENT,
    generate: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Both judgements of one model, as JSON-ready numbers; `conditions` in the order of the results."""
    fit = fitted(records, conditions)
    scores = score_answers(model, template, records, conditions, rows=rows)
    relative = relative_accuracy(scores, fit, len(conditions))
    result: dict[str, Any] = {"questions": len(records), "conditions": []}
    asked: list[Mapping[str, float]] = [*conditions, {}]
    answers: list[list[str]] = []
    for number, condition in enumerate(asked):
        entry: dict[str, Any] = {"condition": dict(condition)}
        if number < len(conditions):
            entry["relative_accuracy"] = relative[number]
        if generate:
            requests: list[tuple[Prompt, Mapping[str, float]]] = [(record.prompt, condition) for record in records]
            answers.append(greedy_answers(model, template, requests, max_new_tokens, progress=progress))
            entry |= greedy_classes(answers[-1], records, template.tags.objectives, no_comment)
            entry["answers"] = answers[-1]
        result["conditions"].append(entry)
    if generate:
        result["changed"] = changed_answers(answers[:-1], conditions)
    return result


def table(results: Mapping[str, Mapping[str, Any]], objectives: Sequence[Objective]) -> str:
    """One row per model and condition; percentages, with 95% intervals by question in brackets.

    `n`: questions that hold a pair to compare. `best NAME`: share of the matched answers rated highest on it.
    """
    names = [o.name for o in objectives]
    width = max(5, *map(len, results))
    asked = max(len(_short(entry["condition"])) for r in results.values() for entry in r["conditions"])
    lines = [f"{'model':<{width}}  {'condition':<{asked}}  {'relative accuracy':>17}  {'n':>4}  {'no comment':>16}"]
    lines[0] += "  matched" + "".join(f"  {'best ' + name:>{len(name) + 5}}" for name in names)
    for model, result in results.items():
        for entry in result["conditions"]:
            relative = entry.get("relative_accuracy")
            line = f"{model:<{width}}  {_short(entry['condition']):<{asked}}  {_percent(relative):>17}"
            line += f"  {relative['questions'] if relative else '-':>4}  {_percent(entry.get('no_comment')):>16}"
            if "matched" in entry:
                shares = {name: entry["best"][name]["mean"] for name in names}
                line += f"  {entry['matched']['mean']:>7.0%}"
                line += "".join(f"  {'-' if x != x else f'{x:.0%}':>{len(n) + 5}}" for n, x in shares.items())
            lines.append(line)
    models = list(results)
    for before, after in zip(models, models[1:], strict=False):
        for old, new in zip(results[before]["conditions"], results[after]["conditions"], strict=True):
            if "relative_accuracy" in new:
                gain = paired_gain(new["relative_accuracy"], old["relative_accuracy"])
                lines.append(f"{after} over {before}, {_short(new['condition'])}: relative {_points(gain)}")
    for model, result in results.items():
        for row in result.get("changed", ()):
            change = f"{row['objective']} alone, {_short(row['from'])} -> {_short(row['to'])}"
            lines.append(f"{model:<{width}}  {change}: changes {_percent(row['changed'])} of the answers")
    return "\n".join(lines)


def _short(condition: Mapping[str, float]) -> str:
    return " ".join(f"{name} {level:g}" for name, level in condition.items()) or "no tags"


def _percent(value: Mapping[str, float] | None) -> str:
    if value is None or value["mean"] != value["mean"]:
        return "-"
    return f"{value['mean']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:+.1f} points [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def read_run(path: Path, base: bool) -> tuple[Config, ModelConfig, Path | None, Path]:
    """(config, where the model is, checkpoint to lay over it, run directory) of a run or a checkpoint in one."""
    checkpoint = path if (path / "state.json").exists() else None
    folder = path.parent.parent if checkpoint else path
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{path} is no run directory and no checkpoint of one: there is no {folder / 'config.yaml'}")
    config = read_config(folder / "config.yaml")
    if base or checkpoint:
        return config, config.model, None if base else checkpoint, folder
    if not (folder / "model").is_dir():
        raise ValueError(f"{folder} holds no model/: train with training.save_model, or name one of its checkpoints")
    adapters = (folder / "model/adapter_config.json").exists()  # over a 4-bit base, or they would have been merged
    quantize = config.model.quantize if adapters else None
    return config, ModelConfig(str(folder / "model"), quantize=quantize, attention=config.model.attention), None, folder


def load(config: Config, source: ModelConfig, checkpoint: Path | None) -> tuple[Any, PromptTemplate, list[Objective]]:
    model, tokenizer = load_model(source, seed=config.seed)
    if checkpoint:
        from safetensors.torch import load_file

        add_adapters(model, config.training, config.seed)
        unknown = model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{checkpoint} holds {unknown[0]!r}, which the model of {config.model.name} has not")
    objectives = [Objective(o.name, o.low, o.high, o.weight, o.strength) for o in config.objectives]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not getattr(model, "is_loaded_in_4bit", False):
        model.float()
    return model.to(device).eval(), PromptTemplate(tokenizer, config.template, objectives), objectives


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="cpo-kernels eval", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a checkpoint inside one")
    parser.add_argument("--base", action="store_true", help="also judge the model that the first run started from")
    parser.add_argument(
        "--data", nargs="+", help="rated answers (JSONL, fields as in the run's config); default: what the run held out"
    )
    parser.add_argument(
        "--condition",
        action="append",
        metavar="honesty=5,helpfulness=1",
        help="to judge (again for more); default: every combination of ratings that 3%% of the answers have",
    )
    parser.add_argument("--questions", type=int, help="judge the first so many questions only")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="length of greedy answers (default 50)")
    parser.add_argument(
        "--no-comment",
        default=NO_COMMENT,
        metavar="REGEX",
        help="what counts as a no-comment answer (default %(default)s, in lower case without punctuation)",
    )
    parser.add_argument("--no-generate", action="store_true", help="likelihood only")
    parser.add_argument("--no-text", action="store_true", help="leave prompts and answers out of the results file")
    parser.add_argument("--out", type=Path, help="JSON file of all results; default: eval.json in the last run")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)

    sources = [(_name(path), path, False) for path in args.runs]
    if args.base:
        sources.insert(0, ("base", args.runs[0], True))
    results: dict[str, Any] = {}
    report: dict[str, Any] = {}
    records: list[Record] = []
    conditions: list[dict[str, float]] = []
    objectives: list[Objective] = []
    for name, path, base in sources:
        config, source, checkpoint, folder = read_run(path, base)
        model, template, objectives = load(config, source, checkpoint)
        if not records:  # all runs are judged on the same questions and conditions
            data = config.data if args.data else DataConfig()  # the trainer writes its own layout
            records = load_records(args.data or [folder / "eval_records.jsonl"], data, objectives, report)
            records = records[: args.questions]
            names = [o.name for o in objectives]
            conditions = [_condition(text, template) for text in args.condition or ()]
            conditions = conditions or rating_conditions(records, names)
        results[name] = evaluate(
            model,
            template,
            records,
            conditions,
            rows=config.training.rows,
            max_new_tokens=args.max_new_tokens,
            no_comment=args.no_comment,
            generate=not args.no_generate,
            progress=True,
        ) | {"run": str(path), "stage": "base" if base else config.stage}
    print(table(results, objectives))
    out = args.out or folder / "eval.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {"versions": versions(), "report": report, "results": results}
    if args.no_text:
        for result in results.values():
            for entry in result["conditions"]:
                entry.pop("answers", None)
    else:
        everything["prompts"] = [prompt_json(record.prompt) for record in records]
    out.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    print(f"results: {out}")
    return 0


def _name(path: Path) -> str:
    parts = path.resolve().parts
    return "/".join((parts[-3], parts[-1])) if parts[-2] == "checkpoints" else parts[-1]


def _condition(text: str, template: PromptTemplate) -> dict[str, float]:
    """`honesty=5,helpfulness=1` as a dict, in the order of the objectives."""
    given = {}
    for part in text.split(","):
        name, equals, level = part.partition("=")
        try:
            given[name.strip()] = float(level)
        except ValueError:
            raise ValueError(f"--condition {text!r}: write objective=level,objective=level") from None
    return template.tags.parse(template.tags.render(given))[0]
