"""Tables and pictures of README and docs, from the results files: `python -m benchmarks.plot`.

With --check it only compares the texts with the results, and fails where they differ.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    filtered_gradients,
    filtered_report,
    long_pairs,
    profile,
    prompt_sharing,
    relative_logits,
    roofline,
)
from benchmarks.claims import rated_report, savings
from benchmarks.claims import report as claims_report
from cpo_kernels.bench import report
from cpo_kernels.bench.families import FAMILIES, HEAD_IMPLEMENTATIONS
from cpo_kernels.environment import processor
from cpo_kernels.head.inputs import HeadConfig
from cpo_kernels.integrations.heads import HEADS
from cpo_kernels.losses.kto import LOSS_TYPES as UNPAIRED
from cpo_kernels.losses.kto import FusedLinearKTOLoss
from cpo_kernels.reference.loss_types import LOSS_TYPES
from tools import version_matrix

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = ROOT / "docs" / "results" / "claims.json"
RATED = ROOT / "docs" / "results" / "claims_truthfulqa.json"
SHORT = ROOT / "docs" / "results" / "claims_truthfulqa_short.json"  # an earlier run with fewer steps
SAVINGS = ROOT / "docs" / "results" / "claims_savings.json"
FILTERED = ROOT / "docs" / "results" / "filtered_training.json"
README_ROWS = (
    "products", "ours", "cce", "naive_unmasked", "naive_unmasked_compiled", "torch_chunked", "naive", "liger",
    "trl_unmasked", "trl",
)  # fmt: skip
FILTERED_ROWS = (
    "products", "products_huge_pages", "ours", "ours_filtered", "ours_filtered_head", "ours_token_logps",
    "ours_token_logps_filtered", "cce", "naive_unmasked",
)  # fmt: skip
GPU_ROWS = (*README_ROWS[:2], "ours_triton", "ours_cuda", "ours_two_pass", "cce_exact", *README_ROWS[2:])
INK, FAINT, OURS, THEIRS = "#30343b", "#c9ccd1", "#1f5fa8", "#a9b4c2"
Result = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- tables


def head_results(content: Result) -> list[Result]:
    return [r for r in content["workloads"] if r["family"] == "head"]


def headline(content: Result, modes: Sequence[str]) -> list[Result]:
    """Workloads that differ from the first in dtype and mode only: README's columns."""
    loads = head_results(content)
    keys = ("head", "groups", "responses", "length", "prompt", "reference", "softcap")
    return [r for r in loads if all(r[k] == loads[0][k] for k in keys) and r["mode"] in modes]


def cell(row: Result) -> str:
    if "why" in row:
        return "not measured"
    memory = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
    return f"{row['ratio']:.2f}× · {memory}"


def readme_table(
    content: Result, rows: Sequence[str] = README_ROWS, modes: Sequence[str] = ("trainable", "frozen")
) -> str:
    loads, env = headline(content, modes), content["environment"]
    heads = [f"{r['dtype']}, {r['mode']}" for r in loads]
    names = [n for n in rows if n in loads[0]["subjects"]]
    heads.append(f"error: log-prob (nat) · dX · dW, {loads[0]['dtype']}")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = [cell(r["subjects"].get(name, {"why": "not asked for"})) for r in loads]
        found = loads[0]["subjects"][name].get("differences", {})
        cells.append(" · ".join(f"{found[key]:.1e}" if key in found else "–" for key in report.NAMES) if found else "")
        lines.append(f"| {HEAD_IMPLEMENTATIONS[name].label} | " + " | ".join(cells) + " |")
    first = loads[0]
    shown = {"torch", *(HEAD_IMPLEMENTATIONS[n].package for n in names)}
    floors = ", ".join(f"{r['subjects']['products'].get('median_s', 0) * 1e3:.0f} ms" for r in loads)
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if name in shown)
    lines += [
        "",
        f"Head {first['head']} ({first['hidden']} × {first['vocab']}), {first['pairs']} pairs of {first['length']} "
        f"tokens of which {first['prompt']} are prompt, forward and backward: time as a multiple of the bare products "
        f"({floors}), then peak memory beyond inputs, gradients included. {machine(env)}, "
        f"Python {env['python']}, {versions}; {dates_and_commits(content, loads)}.",
    ]
    return "\n".join(lines)


def cost(row: Result) -> str:
    return f"{row['median_s']:.2f} s, {row['peak_bytes'] / 2**20:.0f} MiB"


def error(differences: Result) -> str:
    gradients = max(differences[name] for name in ("dx", "dw"))
    return f"{differences['seq_logps']:.1g} nat, {gradients:.1%}"


def gain_table(content: Result) -> str:
    """Six lines of what one gains: README's first table."""
    trained, frozen = (r["subjects"] for r in headline(content, ("trainable", "frozen"))[:2])
    (step,) = (r for r in content["workloads"] if r["family"] == "training_step" and r["responses"] == 2)
    naive, ours = (error(trained[name]["differences"]) for name in ("naive", "ours"))
    first, rows = headline(content, ("trainable",))[0], step["subjects"]
    size = f"{first['pairs']} pairs of {first['length']} tokens"
    lines = [
        ("DPO loss and gradients, trainable head", cost(trained["naive"]), cost(trained["ours"])),
        ("the same, frozen head (LoRA)", cost(frozen["naive"]), cost(frozen["ours"])),
        ("error of a response's log-prob, of its gradients", naive, ours),
        ("training step of SmolLM2-135M with TRL", cost(rows["trl_precomputed"]), cost(rows["fused_trl"])),
        ("the same, our own trainer", "", cost(rows["shared"])),
    ]
    trainers = [r for r in content["workloads"] if r["family"] == "trainers"]
    names = [r["trainer"].upper() for r in trainers]
    pair = [", ".join(f"{r['subjects'][s]['median_s']:.1f}" for r in trainers) for s in ("trl_head", "fused_head")]
    lines.append((f"a step of TRL's {', '.join(names)} trainer, its head trained", *(f"{times} s" for times in pair)))
    table = ["| | before | with cpo-kernels |", "|---|---|---|", *(f"| {' | '.join(line)} |" for line in lines)]
    note = (
        f"Time and peak memory beyond inputs, bfloat16, {machine(content['environment'])}. Lines 1 to 3: head of "
        f"{first['head']} ({first['hidden']} × {first['vocab']}), {size}; before: naive PyTorch. Lines 4 and 5: "
        f"{step['groups']} prompts with 2 responses, up to {step['length']} tokens, reference log-probs given; before: "
        "TRL's `DPOTrainer`. Line 6: the same model, random tokens of that length; before: TRL's fused head "
        "([all figures](docs/trl.md))."
    )
    return "\n".join([*table, "", note])


def trainers_table(content: Result) -> str:
    """A training step of each of TRL's trainers, with TRL's head and with ours."""
    results = [r for r in content.get("workloads", ()) if r["family"] == "trainers"]
    results = [r for r in results if all("ratio" in row for row in r["subjects"].values())]
    if not results:
        return "Not measured yet: `cpo-kernels bench --only trainers`."
    names = ("trl_head", "fused_head", "fused_filtered")
    labels = [FAMILIES["trainers"].implementations[name].label for name in names]
    lines = [f"| a step of | {' | '.join(labels)} |", "|---" * (len(names) + 1) + "|"]
    for result in results:
        theirs, *ours = (result["subjects"][name] for name in names)
        cells = [f"{row['ratio']:.2f}×, {cost(row)}" for row in ours]
        lines.append(f"| `{result['trainer'].upper()}Trainer` | {' | '.join([cost(theirs), *cells])} |")
    first = results[0]
    what = (
        f"{first['model'].rpartition('/')[2]}, {first['groups']} prompts with {first['responses']} responses, up to "
        f"{first['length']} tokens, {first['dtype']}, the model and its head trained, references given, generation not "
        "included: seconds and peak memory of a step"
    )
    return "\n".join([*lines, "", f"{what}. {setting(content, results)}"])


def filtered_table(content: Result) -> str:
    """Exact and filtered gradients on rows of a trained model, as multiples of the exact products."""
    if not content:
        return "not measured"
    loads = head_results(content)
    rows = "rows of a model on text" if loads[0]["rows"] == "real" else "generated rows"
    lines = [
        "| " + " | ".join([rows, *(f"{r['labelled']} tokens, {r['mode']}" for r in loads)]) + " |",
        "|---" * (len(loads) + 1) + "|",
    ]
    for name in (n for n in FILTERED_ROWS if any(n in r["subjects"] for r in loads)):
        cells = [cell(r["subjects"].get(name, {"why": "not asked for"})) for r in loads]
        lines.append(f"| {HEAD_IMPLEMENTATIONS[name].label} | " + " | ".join(cells) + " |")
    note = (
        f"Head {loads[0]['head']}, bfloat16: time as a multiple of the bare exact products, then peak memory. "
        f"{machine(content['environment'])}; {dates_and_commits(content, loads)}."
    )
    return "\n".join([*lines, "", note])


def readme_gpu_table(content: Result) -> str:
    """The head in every mode, and the kernels' share of the copy rate."""
    if not content:
        return "On a GPU: not measured."
    kernels = [f"`{name}` {roofline.measured_kernel(content, name)}" for name in roofline.KERNELS if "token" in name]
    size = f"Kernels on logits of {roofline.ROWS} × {roofline.VOCAB}, bfloat16"
    parts = [f"{size}, bytes over time: {'; '.join(kernels)}."]
    if head_results(content):
        parts.insert(0, readme_table(content, GPU_ROWS, ("trainable", "frozen", "forward")))
    return "\n\n".join(parts)


def with_more(content: Result, more: Result) -> Result:
    """Two files of one machine (tools/gpu.sh): of a workload that stands in both the run that measured more rows."""
    if not content or not more:
        return content or more

    def measured(result: Result) -> int:
        return sum("median_s" in row for row in result["subjects"].values())

    kept = list(content["workloads"])
    for result in more["workloads"]:
        keys = result.keys() - {"subjects", "commit", "date", "load"}
        same = [k for k, r in enumerate(kept) if r.keys() >= keys and all(r[key] == result[key] for key in keys)]
        if not same:
            kept.append(result)
        elif measured(result) > measured(kept[same[0]]):
            kept[same[0]] = result
    late = {key: more[key] for key in ("growth", "cold_start") if more.get(key) and not content.get(key)}
    return {**content, **late, "workloads": kept}


def gpu_results() -> Result:
    return with_more(*(roofline.read(RESULTS / name) for name in ("gpu.json", "gpu-more.json")))


def machine(environment: Result) -> str:
    return (f"{environment['gpu']}, " if "gpu" in environment else "") + processor(environment)


def dates_and_commits(content: Result, results: Sequence[Result]) -> str:
    """Dates and commits: a file that grew by --resume holds several."""
    commits = list(dict.fromkeys(r["commit"] for r in results))
    dates = list(dict.fromkeys(r.get("date", content["environment"]["date"])[:10] for r in results))
    return f"{', '.join(dates)}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def setting(content: Result, results: Sequence[Result]) -> str:
    """What these results of the file were measured on."""
    env = content["environment"]
    versions = ", ".join(f"{n} {v}" for n, v in env["versions"].items() if v != "not installed")
    return (
        f"{machine(env)}, Python {env['python']}, {versions}; {dates_and_commits(content, results)}; "
        f"`{content['command']}`."
    )


def families_table(content: Result, families: Sequence[str]) -> str:
    """Every workload of these families, under its title."""
    results = [r for r in content["workloads"] if r["family"] in families]
    parts = [f"**{report.title(r)}**\n\n{report.table(r)}" for r in results]
    return "\n\n".join([setting(content, results), *parts]) if parts else "not measured"


def measured_growth(content: Result) -> list[Result]:
    """Those with a fitted exponent: a time limit may have cut all points of the others off."""
    return [g for g in content.get("growth", ()) if any(seen["time"] for seen in g["seen"].values())]


def head_table(content: Result) -> str:
    return families_table(content, ["head"]) if content else "not measured"


def sections() -> dict[str, str]:
    """Name of a table in docs/performance.md -> its text."""
    cpu, gpu = roofline.read(RESULTS / "cpu.json"), gpu_results()
    profiled = roofline.read(RESULTS / "profile-cpu.json")
    made = {"roofline": roofline.tables(gpu), "cpu profile": profile.table(profiled) if profiled else "not measured"}
    pairs = roofline.read(RESULTS / "long-pairs-cpu.json")
    for name in ("amx", "avx2"):
        made[f"cpu {name} head"] = head_table(roofline.read(RESULTS / f"cpu-{name}.json"))
    made["cpu long pairs"] = long_pairs.table(pairs) if pairs else "not measured"
    for device, content in (("cpu", cpu), ("gpu", gpu)):
        for name, families in (("head", ["head"]), ("kernels", ["tokens", "preference"]), ("step", ["training_step"])):
            made[f"{device} {name}"] = families_table(content, families) if content else "not measured"
        if content:
            made[f"{device} head"] = (
                f"![the first of these workloads](benchmark_{device}.png)\n\n{made[f'{device} head']}"
            )
        grown = measured_growth(content or {})
        made[f"{device} growth"] = report.growth_table(grown) if grown else "not measured"
        cold = content.get("cold_start")
        made[f"{device} cold start"] = report.cold_start_table(cold) if cold else "not measured"
    return made


def fill(text: str, name: str, table: str) -> str:
    """`text` with `table` between the marks of that name."""
    marks = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)"
    filled, count = re.subn(marks, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"{count} tables are marked {name!r}, want one")
    return filled


def loss_types_table() -> str:
    """A row for each loss type: formula and source from its docstring, needs, options."""
    lines = ["| `loss_type` | loss of a pair | source | reference | options that it honours |", "|---|---|---|---|---|"]
    for name, loss in LOSS_TYPES.items():
        formula, _, rest = inspect.cleandoc(loss.formula).partition("\n\n")
        formula = " ".join(formula.split()).removesuffix(".").replace("||", "‖").replace("|gap|", "abs(gap)")
        needs = "yes" if loss.needs_reference else "no"
        options = ", ".join(f"`{option}`" for option in sorted(loss.honours))
        lines.append(f"| `{name}` | `{formula}` | {' '.join(rest.split())} | {needs} | {options} |")
    return "\n".join(lines)


def unpaired_table() -> str:
    """A row for each loss type of `FusedLinearKTOLoss`."""
    lines = ["| `loss_type` | loss of a response | source | options that it honours |", "|---|---|---|---|"]
    own = inspect.signature(FusedLinearKTOLoss).parameters.keys() - {*HeadConfig._fields, "loss_type", "impl"}
    for name, loss in UNPAIRED.items():
        options = ", ".join(f"`{option}`" for option in sorted(own | ({"kl"} if loss.has_kl else set())))
        lines.append(f"| `{name}` | `{loss.formula}` | {loss.source} | {options} |")
    return "\n".join(lines)


def models_table() -> str:
    """A row for each rule of `HEADS`, with the classes that follow it."""
    lines = ["| logits | classes of transformers (…ForCausalLM) |", "|---|---|"]
    rules = {"_plain": "x Wᵀ + b", "_gemma": "softcap of `final_logit_softcapping`"}
    rules |= {"_recurrent_gemma": "softcap of `logits_soft_cap`", "_cohere": "scale of `logit_scale`"}
    rules |= {"_divided": "scale 1 / `logits_scaling`", "_hyperclovax": "scale of `logits_scaling`"}
    rules |= {"_falcon_h1": "scale of `lm_head_multiplier`"}
    for rule, text in rules.items():
        names = [name.removesuffix("ForCausalLM") for name, found in HEADS.items() if found.__name__ == rule]
        lines.append(f"| {text} | {', '.join(sorted(names, key=str.lower))} |")
    return "\n".join(lines)


def texts() -> dict[Path, str]:
    """File -> what it should hold."""
    readme, performance = ROOT / "README.md", ROOT / "docs" / "performance.md"
    cpu = roofline.read(RESULTS / "cpu.json")
    page = fill(readme.read_text(), "gain", gain_table(cpu))
    page = fill(page, "benchmarks/results/cpu.json", readme_table(cpu))
    made = {readme: fill(page, "benchmarks/results/gpu.json", readme_gpu_table(gpu_results()))}
    page = performance.read_text()
    for name, table in sections().items():
        page = fill(page, name, table)
    made[performance] = page
    results = ROOT / "docs" / "results.md"
    page = results.read_text()
    filled = claims_report.sections(roofline.read(CLAIMS)) | rated_report.sections(roofline.read(RATED))
    short = roofline.read(SHORT)
    filled["rated claims short"] = f"{rated_report.table(short)}\n\n{rated_report.setting(short)}"
    saved = roofline.read(SAVINGS)
    filled["rated claims savings"] = savings.table(saved) if saved else "Not measured."
    for name, table in filled.items():
        page = fill(page, name, table)
    made[results] = page
    for name, table in (("loss types", loss_types_table()), ("models", models_table())):
        path = ROOT / "docs" / f"{name.replace(' ', '_')}.md"
        made[path] = fill(path.read_text(), name, table)
    path = ROOT / "docs" / "loss_types.md"
    made[path] = fill(made[path], "unpaired losses", unpaired_table())
    newest, path = roofline.read(RESULTS / "filtered-amx.json"), ROOT / "docs" / "filtered_gradients.md"
    more = " Errors, ranges, versions and the command: [docs/filtered_gradients.md](docs/filtered_gradients.md)."
    table = filtered_table(newest) + more * bool(newest)
    made[readme] = fill(made[readme], "benchmarks/results/filtered-amx.json", table)
    errors = roofline.read(RESULTS / "filtered_gradients.json")
    page = fill(path.read_text(), "filtered errors", filtered_gradients.table(errors) if errors else "not measured")
    page = fill(page, "filtered head", head_table(roofline.read(RESULTS / "filtered.json")))
    for name in ("amx", "avx512"):
        one = roofline.read(RESULTS / f"filtered-{name}.json")
        page = fill(page, f"filtered {name}", filtered_table(one))
        page = fill(page, f"filtered head {name}", head_table(one))
    made[path] = page
    relative, path = roofline.read(RESULTS / "relative_logits.json"), ROOT / "docs" / "relative_logits.md"
    table = relative_logits.table(relative) if relative else "not measured"
    made[path] = fill(path.read_text(), "relative logits", table)
    training = ROOT / "docs" / "training.md"
    shared = roofline.read(RESULTS / "prompt_sharing.json")
    table = prompt_sharing.table(shared) if shared else "not measured"
    made[training] = fill(training.read_text(), "prompt sharing", table)
    trl, tried = ROOT / "docs" / "trl.md", roofline.read(version_matrix.OUT)
    made[trl] = fill(trl.read_text(), "trainers", trainers_table(cpu))
    made[trl] = fill(made[trl], "versions", version_matrix.table(tried) if tried else "not tried")
    filtered = ROOT / "docs" / "filtered_gradients_training.md"
    page = filtered.read_text()
    for name, table in filtered_report.sections(roofline.read(FILTERED) or {}).items():
        page = fill(page, name, table)
    made[filtered] = page
    return made


# ----------------------------------------------------------------------------------------------------------- pictures


def finished(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(color=FAINT, labelcolor=INK)
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    print(f"wrote {path}")


def draw_head(content: Result, path: Path) -> None:
    """Time and peak memory of every implementation in the first workload."""
    from matplotlib import pyplot as plt

    first = head_results(content)[0]
    rows = {n: r for n, r in first["subjects"].items() if "ratio" in r}
    names = sorted(rows, key=lambda n: -rows[n]["ratio"])
    labels = [HEAD_IMPLEMENTATIONS[n].label.replace("*", "").replace("`", "") for n in names]
    colours = [OURS if n == "ours" else INK if n == "products" else THEIRS for n in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.2 + 0.36 * len(names)), sharey=True)
    errors = [[abs(rows[n]["ratio"] - rows[n]["ratio_spread"][side]) for n in names] for side in (0, 1)]
    left.barh(labels, [rows[n]["ratio"] for n in names], color=colours, xerr=errors, ecolor=FAINT)
    left.set_xlabel("time, × the bare matrix products", color=INK)
    right.barh(labels, [(rows[n]["peak_bytes"] or 0) / 2**20 for n in names], color=colours)
    right.set_xlabel("peak memory beyond inputs, MiB", color=INK)
    figure.suptitle(report.title(first), color=INK, fontsize=11)
    finished(figure, path)


def draw_growth(growths: Sequence[Result], path: Path) -> None:
    """Time against size on logarithmic axes, a panel for each size."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, len(growths), figsize=(4.2 * len(growths), 3.6), squeeze=False)
    for axis, growth in zip(axes.flat, growths, strict=True):
        for name, colour in zip(growth["seen"], (INK, OURS, THEIRS), strict=True):
            points = [p for p in growth["points"] if "median_s" in p["subjects"][name]]
            times = [p["subjects"][name]["median_s"] for p in points]
            label = HEAD_IMPLEMENTATIONS[name].label.replace("*", "")
            axis.loglog([p[growth["over"]] for p in points], times, marker="o", color=colour, label=label)
        sizes = [p[growth["over"]] for p in growth["points"]]
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=growth["over"], ylabel="seconds")
    axes.flat[0].legend(frameon=False, fontsize=8)
    finished(figure, path)


def draw(content: Result, device: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    draw_head(content, ROOT / "docs" / f"benchmark_{device}.png")
    if grown := measured_growth(content):
        draw_growth(grown, ROOT / "docs" / f"growth_{device}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a text differs")
    check = parser.parse_args().check
    different = {path: text for path, text in texts().items() if path.read_text() != text}
    if check:
        for path in different:
            print(f"{path.relative_to(ROOT)} differs from the results: run python -m benchmarks.plot", file=sys.stderr)
        return 1 if different else 0
    for path, text in different.items():
        path.write_text(text)
        print(f"wrote {path}")
    for device, content in (("cpu", roofline.read(RESULTS / "cpu.json")), ("gpu", gpu_results())):
        if content and head_results(content):
            draw(content, device)
    if content := roofline.read(CLAIMS):
        finished(claims_report.figure(content), ROOT / "docs" / "claims.png")
    if content := roofline.read(RATED):
        finished(rated_report.figure(content), ROOT / "docs" / "claims_truthfulqa.png")
    if content := roofline.read(FILTERED):
        finished(filtered_report.figure(content), ROOT / "docs" / "filtered_training.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
