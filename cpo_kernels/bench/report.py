"""Results as markdown tables."""

from collections.abc import Sequence
from typing import Any

from cpo_kernels.bench.families import FAMILIES

Result = dict[str, Any]


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def title(result: Result) -> str:
    """One line that describes what was measured."""
    r = result
    if r["family"] == "head":
        cap = f", softcap {r['softcap']:g}" if r["softcap"] else ""
        groups = f"{r['groups']} groups of {r['responses']} responses, " if r["responses"] > 2 else ""
        reference = ", reference computed" if r["reference"] == "computed" else ""
        return (
            f"{r['head']} ({r['hidden']} × {r['vocab']}{cap}), {groups}{r['pairs']} pairs of {r['length']} tokens of "
            f"which {r['prompt']} are prompt, {r['dtype']}, {r['mode']}{reference}"
        )
    if r["family"] == "tokens":
        cap = f", softcap {r['softcap']:g}" if r["softcap"] else ""
        return f"logits {r['rows']} × {r['vocab']}, {r['dtype']}{cap}"
    if r["family"] == "preference":
        return f"preference of {r['pairs']} pairs × {r['objectives']} objectives"
    lengths = f"of {r['length']} tokens of which {r['prompt']} are prompt"
    if r["data"]:
        lengths = (
            f"of at most {r['length']} tokens from {r['data'].rpartition('/')[2]} ({r['prompt_tokens']} of prompts, "
        )
        lengths += f"{r['completion_tokens']} of responses)"
    prompts = f"{r['groups']} prompts with {r['responses']} responses {lengths}"
    step = f"training step of {r['model'].rpartition('/')[2]}, {prompts}, {r['dtype']}"
    return f"{r['trainer'].upper()}Trainer of TRL: {step}" if r["family"] == "trainers" else step


def rate(result: Result, name: str, row: Result) -> str:
    """The throughput of a family: share of the device's copy rate, or completion tokens per second."""
    if result["family"] == "tokens":
        traffic = FAMILIES["tokens"].implementations[name].traffic
        if not traffic:
            return ""
        share = f" ({traffic / 2 / row['ratio']:.0%} of copy)" if "ratio" in row else ""
        return f"{traffic * result['bytes'] / row['median_s'] / 1e9:.3g} GB/s{share}"
    if result["family"] in ("training_step", "trainers"):
        return f"{result['completion_tokens'] / row['median_s']:,.0f} completion tokens/s"
    return ""


def memory(result: Result, row: Result) -> str:
    if row["peak_bytes"] is None:
        return "not measured"
    beyond = ""
    if "gradient_bytes" in result:
        beyond = f" ({(row['peak_bytes'] - result['gradient_bytes']) / 2**20:.0f} beyond gradients)"
    return f"{row['peak_bytes'] / 2**20:.0f} MiB{beyond}"


NAMES = {"seq_logps": "log-prob", "dx": "dX", "dw": "dW"}


def errors(row: Result) -> str:
    """Differences from the truth: relative, but of the log-probs of responses the rms in nats."""
    found = row["differences"]
    return ", ".join(
        f"{NAMES.get(name, name)} {found[name]:.1e}"
        for name in (*NAMES, *sorted(found.keys() - NAMES))
        if name in found
    )


def table(result: Result) -> str:
    """The table of one workload; a single line if nothing was measured, all for the same reason."""
    reasons = {row.get("why") for row in result["subjects"].values()}
    if len(reasons) == 1 and (reason := reasons.pop()):
        return f"not measured: {reason}"
    family = FAMILIES[result["family"]]
    floor = f"× of {family.floor}" if family.floor else "× of floor"
    plan = [f"Ours: {result['plan']}.", ""] if "plan" in result else []
    lines = [
        *plan,
        f"| | median (range) | {floor} (range) | rate | first step | peak memory | error |",
        "|---" * 7 + "|",
    ]
    for name, row in result["subjects"].items():
        label = family.implementations[name].label
        if "why" in row:
            lines.append(f"| {label} | not measured: {row['why']} | | | | | |")
            continue
        ratio = f"{row['ratio']:.2f} ({' to '.join(f'{x:.2f}' for x in row['ratio_spread'])})" if "ratio" in row else ""
        peak = memory(result, row)
        spread = f"{duration(row['min_s'])} to {duration(row['max_s'])}"
        lines.append(
            f"| {label} | {duration(row['median_s'])} ({spread}) | {ratio} | {rate(result, name, row)} | "
            f"{duration(row['first_s'])} | {peak} | {errors(row)} |"
        )
    return "\n".join(lines)


def memory_beyond_gradients(point: Result, name: str) -> str:
    peak = point["subjects"][name]["peak_bytes"]
    return "?" if peak is None else f"{(peak - point['gradient_bytes']) / 2**20:.0f}"


def growth_table(growths: Sequence[Result]) -> str:
    heads = "| grows with | implementation | time ~ size^ | expected | extra memory ~ size^ | expected | extra, MiB |"
    lines = [heads, "|---" * 7 + "|"]
    for growth in growths:
        for name, fit in growth["seen"].items():
            points = [p for p in growth["points"] if "median_s" in p["subjects"][name]]
            values = ", ".join(str(p[growth["over"]]) for p in points)
            extra = ", ".join(memory_beyond_gradients(p, name) for p in points)
            label = FAMILIES["head"].implementations[name].label
            time, memory = ("not measured" if fit[k] is None else f"{fit[k]:.2f}" for k in ("time", "memory"))
            # A memory budget limits only ours; the others store logits for all their rows.
            expected = f"at most {growth['expected']['memory']:.0f}" if name == "ours" else ""
            lines.append(f"| {growth['over']} ({values}) | {label} | {time} | 1 | {memory} | {expected} | {extra} |")
    return "\n".join(lines)


def cold_start_table(cold: Result) -> str:
    if "why" in cold:
        return f"not measured: {cold['why']}"
    lines = ["| | import torch | import cpo_kernels | first loss and backward |", "|---" * 4 + "|"]
    for name, label in (("first", "nothing cached"), ("again", f"again, median of {cold['runs']}")):
        lines.append(f"| {label} | " + " | ".join(duration(cold[name][k]) for k in cold[name]) + " |")
    return "\n".join(lines)
