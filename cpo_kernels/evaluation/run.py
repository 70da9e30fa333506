"""`cpo-kernels eval`: from models to tables, results file and report, as its `arguments` request."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from cpo_kernels.data.fields import prompt_of
from cpo_kernels.data.preparation import encodable
from cpo_kernels.data.records import Record, prompt_json, prompt_text
from cpo_kernels.data.sources import load_records, notes
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.environment import check_options
from cpo_kernels.evaluation.achieved import win_rates
from cpo_kernels.evaluation.arguments import parser
from cpo_kernels.evaluation.greedy import NO_COMMENT
from cpo_kernels.evaluation.judgements import evaluate, score
from cpo_kernels.evaluation.likelihood import rating_conditions
from cpo_kernels.evaluation.llm_judge import PROMPT, Judge
from cpo_kernels.evaluation.loading import Source, find_model, load
from cpo_kernels.evaluation.requests import (
    check_positive,
    condition_grid,
    parse_condition,
    parse_objective,
    read_prompts,
)
from cpo_kernels.evaluation.scorers import Scorer, make_scorer
from cpo_kernels.evaluation.tables import rated_table, score_table
from cpo_kernels.files import atomic_text
from cpo_kernels.objectives import Objective, TagTemplate
from cpo_kernels.recipe.keys import DataConfig
from cpo_kernels.training.rundir import versions


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(argv))


def run(args: Any) -> int:
    check_positive(args, "questions", "judge_parallel", "max_new_tokens", "batch_size")
    args.no_comment = NO_COMMENT if args.no_comment is None else args.no_comment
    try:
        re.compile(args.no_comment)
    except re.error as error:
        raise ValueError(f"--no-comment {args.no_comment!r} is not a regular expression: {error}") from None
    if bool(args.models) == bool(args.answers):
        raise ValueError("give the models to evaluate, or the results file of an earlier evaluation with --answers")
    if args.scorer and args.no_generate:
        raise ValueError("--scorer scores generated answers: remove --no-generate")
    if args.prompts and args.data:
        raise ValueError("give --prompts or --data, not both")
    if args.report:
        from cpo_kernels.evaluation.report import need_matplotlib, write_report

        need_matplotlib()  # before the work of hours
    if args.answers:
        everything, objectives = _read_answers(args.answers)
        out = _writable(args.out or (args.report or args.answers.parent) / "eval.json", args.report)
        scorer = _scorer(args, objectives, out)
        entries = [entry for result in everything["results"].values() for entry in result["conditions"]]
        if scorer and ("prompts" not in everything or any("answers" not in entry for entry in entries)):
            raise ValueError(f"{args.answers} has no answers to score: it was written with --no-text or --no-generate")
    else:
        sources = _sources(args)
        objectives = [parse_objective(text) for text in args.objective] or _objectives(sources)
        out = _writable(args.out or (args.report or sources[-1].folder or Path()) / "eval.json", args.report)
        scorer = _scorer(args, objectives, out)
        everything = _answer(args, sources, objectives)
        if not args.out:
            _set_aside(out)
        _save(everything, out, not args.no_text)  # save the answers in case a scorer fails
    results = everything["results"]
    if scorer:
        prompts = [prompt_text(prompt_of({"prompt": prompt}, "prompt")) for prompt in everything["prompts"]]
        for name, result in results.items():
            results[name] = score(result, prompts, objectives, scorer)
        everything["win_rates"] = win_rates({name: r["conditions"] for name, r in results.items()}, objectives)
        _save(everything, out, not args.no_text)
    if "win_rates" in everything:
        print(score_table(results, objectives, everything["win_rates"]))
    elif any("matched" in entry or "relative_accuracy" in entry for r in results.values() for entry in r["conditions"]):
        print(rated_table(results, objectives))
    print(f"results: {out if scorer or args.models else args.answers}")
    if args.report:
        print(f"report: {write_report(without_text(everything) if args.no_text else everything, args.report)}")
    return 0


def _read_answers(file: Path) -> tuple[dict[str, Any], list[Objective]]:
    """(results of an earlier evaluation, its objectives)."""
    try:
        everything = json.loads(file.read_text(encoding="utf-8"))
        objectives = [Objective(**o) for o in everything["objectives"]]
        if all("condition" in entry for r in everything["results"].values() for entry in r["conditions"]):
            return everything, objectives
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(
        f"--answers {file} is not a results file of cpo-kernels eval: give the JSON file that its --out wrote"
    )


def _writable(out: Path, report: Path | None) -> Path:
    """`out`, after creating its folder and the report's: no work is lost to a path that cannot be written."""
    check_options(out)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
    return out


def _answer(args: Any, sources: Sequence[Source], objectives: Sequence[Objective]) -> dict[str, Any]:
    """Every model's answers and likelihoods: the results without scores."""
    report: dict[str, Any] = {}
    records = _records(args, sources[0], objectives, report)
    for note in notes(report):
        print(note)
    conditions = _conditions(args, sources[0], objectives, records)
    if not args.no_generate:
        count = len(sources) * len(records) * (len(conditions) + 1)
        print(
            f"{len(sources)} model(s), {len(records)} prompts, {len(conditions)} conditions and no tags: {count} "
            "answers"
        )
    results: dict[str, Any] = {}
    for source in sources:
        model, template = load(source, objectives)
        results[source.name] = evaluate(
            model,
            template,
            records,
            conditions,
            tags=source.name not in args.without_tags,
            rows=source.config.training.rows,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            no_comment=args.no_comment,
            generate=not args.no_generate,
            likelihood=not args.no_likelihood,
            progress=not args.quiet,
        ) | {"run": str(source.folder or source.model.name), "stage": _stage(source)}
        del model
    return {
        "versions": versions(),
        "report": report,
        "objectives": [asdict(o) for o in objectives],
        "prompts": [prompt_json(record.prompt) for record in records],
        "results": results,
    }


def _set_aside(out: Path) -> None:
    """Never overwrite hours of answers: an existing `out` is renamed with its time."""
    if out.exists():
        written = datetime.fromtimestamp(out.stat().st_mtime)
        earlier = out.with_name(f"{out.stem}.{written:%Y%m%d-%H%M%S}{out.suffix}")
        out.rename(earlier)
        print(f"earlier results, renamed: {earlier}")


def _save(everything: dict[str, Any], out: Path, text: bool) -> None:
    kept = everything if text else without_text(everything)
    atomic_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", out)


def without_text(everything: dict[str, Any]) -> dict[str, Any]:
    """The results without prompts and answers."""
    results = {}
    for name, result in everything["results"].items():
        entries = [{key: x for key, x in entry.items() if key != "answers"} for entry in result["conditions"]]
        results[name] = result | {"conditions": entries}
    return {key: x for key, x in everything.items() if key != "prompts"} | {"results": results}


def _sources(args: Any) -> list[Source]:
    options = {"recipe": args.config, "tokenizer": args.tokenizer}
    sources = [find_model(given, **options) for given in args.models]
    if args.base:
        sources.insert(0, find_model(args.models[0], base=True, **options))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} models have the name {name!r}: rename a folder")
    for name in args.without_tags:
        if name not in names:
            raise ValueError(f"--without-tags {name!r} is not one of {', '.join(names)}")
    return sources


def _objectives(sources: Sequence[Source]) -> list[Objective]:
    """The objectives of the runs, which must agree so that requests and scores mean the same for all models."""
    first = sources[0].objectives
    if not first:
        raise ValueError(f"{sources[0].name} has no objectives: give --objective NAME:LOW:HIGH")
    scale = [(o.name, o.low, o.high) for o in first]
    for source in sources[1:]:
        other = [(o.name, o.low, o.high) for o in source.objectives]
        if other and other != scale:
            raise ValueError(
                f"{sources[0].name} has the objectives {scale}, {source.name} has {other}: give --objective"
            )
    return first


def _records(args: Any, source: Source, objectives: Sequence[Objective], report: dict[str, Any]) -> list[Record]:
    if args.prompts:
        records = read_prompts(args.prompts)
    elif args.data:
        records = load_records(args.data, source.config.data, objectives, report)
        if source.config.data.on_bad_line == "skip":
            template = PromptTemplate(load_tokenizer(source.model), source.config.template, objectives)
            records = list(encodable(source.config.data, records, template, report))
    else:  # the trainer writes layout records
        held_out = source.folder and source.folder / "eval_records.jsonl"
        if not held_out or not held_out.exists():
            raise ValueError(f"{source.name} has no held-out data: give --prompts or --data")
        records = load_records([held_out], DataConfig(), objectives, report)
    return records[: args.questions]


def _conditions(
    args: Any, source: Source, objectives: Sequence[Objective], records: Sequence[Record]
) -> list[dict[str, float]]:
    tags = TagTemplate(objectives, source.config.template.tags)
    conditions = [parse_condition(text, tags) for text in args.condition or ()]
    conditions += condition_grid(objectives, args.grid) if args.grid else []
    if not conditions and args.scorer:
        conditions = condition_grid(objectives)
    if not conditions:
        conditions = rating_conditions(records, [o.name for o in objectives])
    if not conditions:
        raise ValueError("there are no ratings to take conditions from: give --condition or --grid")
    return [condition for i, condition in enumerate(conditions) if condition not in conditions[:i]]


def _scorer(args: Any, objectives: Sequence[Objective], out: Path) -> Scorer | None:
    cache = args.judge_cache or out.parent / "judge_cache"
    return (
        make_scorer(args.scorer, objectives, lambda url, some: _judge(args, url, some, cache)) if args.scorer else None
    )


def _judge(args: Any, url: str, objectives: list[Objective], cache: Path) -> Scorer:
    if not args.judge_model:
        raise ValueError("--scorer judge:URL needs --judge-model NAME")
    try:
        options = json.loads(args.judge_options)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--judge-options must be a JSON object, got {args.judge_options!r}")
    if args.judge_template and not Path(args.judge_template).is_file():
        raise FileNotFoundError(f"--judge-template: {args.judge_template} does not exist")
    template = Path(args.judge_template).read_text(encoding="utf-8") if args.judge_template else PROMPT
    return Judge(
        url, args.judge_model, objectives, template, options, cache, args.judge_key_env, parallel=args.judge_parallel
    )


def _stage(source: Source) -> str:
    return "base" if source.name == "base" else source.config.stage
