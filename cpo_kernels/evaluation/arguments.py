"""Judge models side by side, on held-out questions or on your own prompts.

Each model answers every prompt under every condition of a grid. A scorer of your choice scores the answers; the tables
show requested against achieved scores, Pareto fronts and win rates. Without a scorer the questions must come with
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
        "--answers", type=Path, metavar="FILE", help="score or report the results file of an earlier evaluation instead"
    )
    add("--base", action="store_true", help="also judge the model that the first run started from")
    add("--config", metavar="RECIPE", help="recipe with template and objectives; default: the run's config.yaml")
    add("--tokenizer", metavar="FOLDER", help="for models whose folder holds none")
    add(
        "--objective",
        action="append",
        default=[],
        metavar="NAME:LOW:HIGH",
        help="in place of the config's (again for more)",
    )
    add("--data", nargs="+", help="rated answers, fields as in the run's config; default: what the run held out")
    add("--prompts", metavar="FILE", help="only prompts: a text file, one a line, or JSONL with `prompt`")
    add("--questions", type=int, help="judge the first so many questions only")
    add("--condition", action="append", metavar="honesty=5,helpfulness=1", help="to judge (again for more)")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="honesty=1,3,5",
        help="levels of an objective (again for more): every combination is judged. Default with --scorer: five levels "
        "each; without: every combination of ratings that 3%% of the answers have",
    )
    add(
        "--scorer",
        action="append",
        default=[],
        metavar="[OBJECTIVE=]KIND:...",
        help="python:module:function | OBJECTIVE=model:FOLDER | judge:http://host/v1 (again for more)",
    )
    add("--judge-model", metavar="NAME", help="model that the judge's server is asked for")
    add("--judge-template", metavar="FILE", help="text with {prompt}, {response}, {objectives} and {example}")
    add(
        "--judge-cache",
        type=Path,
        metavar="FOLDER",
        help="replies kept for later runs; default: judge_cache beside the results",
    )
    add(
        "--judge-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable of the key (default %(default)s)",
    )
    add(
        "--judge-options",
        default='{"temperature": 0}',
        metavar="JSON",
        help="further keys of a request (default %(default)s)",
    )
    add("--judge-parallel", type=int, default=8, help="requests at a time (default 8)")
    add("--max-new-tokens", type=int, default=50, help="length of greedy answers (default 50)")
    add("--batch-size", type=int, default=64, help="answers generated together (default 64)")
    add(
        "--without-tags",
        action="append",
        default=[],
        metavar="NAME",
        help="a model that gets the bare prompt, whatever is requested (a baseline; again for more)",
    )
    add(
        "--no-comment",
        metavar="REGEX",
        help="what counts as a no-comment answer, in lower case without punctuation; default: i have no comment, and "
        "the like",
    )
    add("--no-generate", action="store_true", help="likelihood only")
    add("--no-likelihood", action="store_true", help="generated answers only")
    add("--no-text", action="store_true", help="leave prompts and answers out of the results file and the report")
    add("--out", type=Path, help="JSON file of all results; default: eval.json in the report, or in the last run")
    add("--report", type=Path, metavar="FOLDER", help="write report.html and its pictures there")
    return made
