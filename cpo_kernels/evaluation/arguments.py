"""Evaluate models side by side, on held-out questions or on your own prompts.

Each model answers every prompt under every condition of a grid. A scorer of your choice scores the answers; the tables
show requested against achieved scores, Pareto fronts and win rates. Without a scorer the questions must have
human-rated answers: then the tables show, for each condition, the relative accuracy by likelihood (float32), the
ratings of answers that match a rated one, and what a single tag changes.

    cpo-kernels eval runs/demo/{sft,cpsft,cdpo} --without-tags sft --scorer python:cpo_kernels.demo.scorer:score
    cpo-kernels eval runs/cdpo --condition honesty=5,helpfulness=1 --questions 20
"""

from __future__ import annotations

from pathlib import Path

from cpo_kernels.arguments import Parser


def parser() -> Parser:
    made = Parser("cpo-kernels eval", __doc__ or "")
    add = made.add_argument
    add("models", nargs="*", metavar="MODEL", help="run directory, checkpoint inside one, or transformers directory")
    add(
        "--answers",
        type=Path,
        metavar="FILE",
        help="instead of models: score or report the results file of an earlier evaluation",
    )
    add("--base", action="store_true", help="also evaluate the model that the first run started from")
    add("--config", metavar="RECIPE", help="recipe with template and objectives; default: the run's config.yaml")
    add("--tokenizer", metavar="FOLDER", help="for models whose folder has none")
    add(
        "--objective",
        action="append",
        default=[],
        metavar="NAME:LOW:HIGH",
        help="instead of the config's (repeatable)",
    )
    add(
        "--data", nargs="+", help="rated answers, with the fields of the run's config; default: the run's held-out data"
    )
    add(
        "--prompts",
        metavar="FILE",
        help="prompts only: a text file with one per line, or rows with `prompt` (.jsonl, .json, .csv, .parquet)",
    )
    add("--questions", type=int, help="use only the first N questions")
    add("--condition", action="append", metavar="honesty=5,helpfulness=1", help="condition to evaluate (repeatable)")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="honesty=1,3,5",
        help="levels of an objective (repeatable); every combination is evaluated. Default with --scorer: five levels "
        "each; without: every combination of ratings that 3%% of the answers have",
    )
    add(
        "--scorer",
        action="append",
        default=[],
        metavar="[OBJECTIVE=]KIND:...",
        help="python:module:function | OBJECTIVE=model:FOLDER | judge:http://host/v1 (repeatable)",
    )
    add("--judge-model", metavar="NAME", help="model name for the judge's server")
    add("--judge-template", metavar="FILE", help="text file with {prompt}, {response}, {objectives} and {example}")
    add(
        "--judge-cache",
        type=Path,
        metavar="FOLDER",
        help="folder of cached replies; default: judge_cache next to the results",
    )
    add(
        "--judge-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the API key (default %(default)s)",
    )
    add(
        "--judge-options",
        default='{"temperature": 0}',
        metavar="JSON",
        help="additional JSON keys of a request (default %(default)s)",
    )
    add("--judge-parallel", type=int, default=8, help="concurrent requests (default 8)")
    add("--max-new-tokens", type=int, default=50, help="maximum length of greedy answers (default 50)")
    add("--batch-size", type=int, default=64, help="answers generated per batch (default 64)")
    add(
        "--without-tags",
        action="append",
        default=[],
        metavar="NAME",
        help="a baseline model that always gets the bare prompt, whatever is requested (repeatable)",
    )
    add(
        "--no-comment",
        metavar="REGEX",
        help="regular expression of no-comment answers, in lower case without punctuation; "
        "default: i have no comment, and similar",
    )
    add("--no-generate", action="store_true", help="likelihood only")
    add("--no-likelihood", action="store_true", help="skip likelihoods: generated answers only")
    add("--no-text", action="store_true", help="omit prompts and answers from the results file and the report")
    add(
        "--out",
        type=Path,
        help="JSON file for all results; default: eval.json in the report's folder, or in the last run",
    )
    add("--report", type=Path, metavar="FOLDER", help="folder for report.html and its pictures")
    return made
