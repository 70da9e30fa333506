"""What each kernel and head strategy must move and compute, the floor on a GPU, and what was measured of it.

python -m benchmarks.roofline [--results benchmarks/results/gpu.json]

The floor of a kernel is its bytes over the device's copy rate; the small ones take the few µs of a launch instead. The
floor of the head is its products at the device's rate; between them our kernels pass over the logits, which relative
logits fill and read once more. This gives the ratio to expect without any overlap and without waiting for the host.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_kernels.head.relative import net_columns

RESULTS = Path(__file__).parent / "results" / "gpu.json"


@dataclass(frozen=True)
class Device:
    """Rates measured with torch: device-to-device copy, bytes read and written; bfloat16 product of random data."""

    name: str
    bytes_per_s: float
    flops_per_s: float


DEVICES = (Device("H200", 4.3e12, 790e12), Device("H100", 3.0e12, 798e12))
ROWS, VOCAB, ITEM = 4096, 128256, 2  # of the kernels: one chunk of Llama-3's head in bfloat16
TOKENS, HIDDEN = 8192, 4096  # of the head
PAIRS, OBJECTIVES = 256, 4

# kernel -> (bytes, floating-point operations, implementation of the family and its name there)
LOGITS = ROWS * VOCAB
KERNELS = {
    # An online softmax: maximum, subtraction, exponential, sum.
    "token_logps_fwd": (LOGITS * ITEM, 4 * LOGITS, ("tokens", "forward_{impl}")),
    # Subtraction, exponential, one product by the upstream gradient; read and written.
    "token_logps_bwd_": (2 * LOGITS * ITEM, 3 * LOGITS, ("tokens", "backward_{impl}")),
    # Both; the second read of a row is meant to come from the L2 cache.
    "token_logps_fused_": (2 * LOGITS * ITEM, 7 * LOGITS, ("tokens", "fused_{impl}")),
    # Float32 in, float64 sums: one number a sequence out.
    "sequence_sum": (4 * TOKENS, TOKENS, None),
    # Two responses a pair, each with its log-probs, K ratings and K conditions in float64; some ten numbers out.
    "preference": (
        PAIRS * (2 * (8 + 8 * OBJECTIVES) + 8 * OBJECTIVES + 40),
        PAIRS * (2 * 4 * OBJECTIVES + 50),
        ("preference", "preference_{impl}"),
    ),
}

# strategy -> (products, passes over the logits by our kernels: reads and writes, times that logits are computed, mode,
# implementation)
STRATEGIES = {
    "forward": (1, 1, 1, "forward", "ours"),
    "frozen": (2, 2, 1, "frozen", "ours"),
    "pairs": (3, 3, 1, "trainable", "ours"),
    "two_pass": (4, 3, 2, "trainable", "ours_two_pass"),
    "recompute": (4, 3, 2, "trainable", "ours_token_logps"),
}
# Relative logits: a buffer is filled with the rows' constants, and the product reads it.
SHIFT_PASSES = 2

# Gradients on live columns (`filter_eps`), sets of 128 rows. The shares are those of SmolLM2's head on 4,096 labelled
# rows of UltraFeedback: of live columns in a set, and of pairs (set, 128 columns) that hold one, where columns are
# sorted by the sets in which they live (kernels/live_matmul.py).
SET_ROWS, TILE_ROWS, TILE_HIDDEN = 128, 128, 256
LIVE = {"2⁻¹⁴": (0.134, 0.34), "2⁻¹²": (0.068, 0.21)}
L2_BYTES_PER_S = 5.5e12  # of both cards, assumed: published read rates of an H100 are 5.5 to 7 TB/s
# path -> (mode, whether dX, dW are of live columns; None: not made)
LIVE_PATHS = {
    "frozen": ("frozen", True, None),
    "dW exact": ("trainable", True, False),
    "dW filtered": ("trainable", True, True),
}


def kernel_floor(name: str, device: Device) -> float:
    """Seconds."""
    return KERNELS[name][0] / device.bytes_per_s


def head_floor(name: str, device: Device) -> tuple[float, float]:
    """(seconds of the products that the strategy does, seconds of the passes over the logits besides, and of the logits
    in the columns from which the rows' constants are computed)."""
    products, passes, times, *_ = STRATEGIES[name]
    product = 2 * TOKENS * HIDDEN * VOCAB / device.flops_per_s
    moved = (passes + SHIFT_PASSES * times) * TOKENS * VOCAB * ITEM / device.bytes_per_s
    columns = net_columns(TOKENS, VOCAB) / VOCAB
    return products * product, moved + columns * product


def live_dx(live: float, device: Device) -> float:
    """Seconds: the operations, or the bytes that L2 gives, rows of W to each set and g to each tile of H."""
    elements = TOKENS * VOCAB * live
    cached = ITEM * elements * (HIDDEN / SET_ROWS + HIDDEN / TILE_HIDDEN)
    return max(2 * elements * HIDDEN / device.flops_per_s, cached / L2_BYTES_PER_S)


def live_dw(live: float, tiles: float, device: Device) -> tuple[float, float]:
    """(seconds of the product, seconds to pack g and to add to a float32 dW: not overlapped, which some of it is)."""
    elements = TOKENS * VOCAB * tiles
    cached = ITEM * elements * (HIDDEN / TILE_ROWS + HIDDEN / TILE_HIDDEN)
    moved = ITEM * (TOKENS * VOCAB * live + 2 * elements) + 2 * 4 * HIDDEN * VOCAB
    product = max(2 * elements * HIDDEN / device.flops_per_s, cached / L2_BYTES_PER_S)
    return product, moved / device.bytes_per_s


def live_head(path: str, eps: str, device: Device) -> tuple[float, float]:
    """(seconds of the products, seconds of everything else) of forward and backward on live columns."""
    _, _, dw_is_live = LIVE_PATHS[path]
    live, tiles = LIVE[eps]
    exact = 2 * TOKENS * HIDDEN * VOCAB / device.flops_per_s
    sectors = 1 - (1 - live) ** 16  # of 32 bytes that hold a live column, if those are spread evenly
    # log-probs, live_columns; live_grads reads sectors and writes g
    passes = 2 + SHIFT_PASSES + sectors + live
    products = exact + live_dx(live, device)
    rest = net_columns(TOKENS, VOCAB) / VOCAB * exact
    if dw_is_live:
        product, besides = live_dw(live, tiles, device)
        products, rest = products + product, rest + besides
    elif dw_is_live is not None:
        products += exact
        passes += 2  # the whole gradient in place of the logits
    return products, rest + passes * TOKENS * VOCAB * ITEM / device.bytes_per_s


def least_products(mode: str) -> int:
    return min(products for products, _, _, m, _ in STRATEGIES.values() if m == mode)


def find(report: dict[str, Any], family: str, implementation: str, **keys: Any) -> dict[str, Any]:
    """An implementation's row in the first workload with these keys; {} where there is none or it was not measured."""
    for result in report.get("workloads", ()):
        if result["family"] == family and all(result[k] == v for k, v in keys.items()):
            row = result["subjects"].get(implementation, {})
            return row if "median_s" in row else {}
    return {}


def measured_kernel(report: dict[str, Any], name: str) -> str:
    """Share of the copy rate of the same run, or time, for each backend that was measured."""
    where = KERNELS[name][2]
    if where is None:
        return "not measured"
    family, pattern = where
    keys = {"rows": ROWS, "vocab": VOCAB, "dtype": "bfloat16"} if family == "tokens" else {"pairs": PAIRS}
    seen = []
    for impl in ("triton", "cuda"):
        row = find(report, family, pattern.format(impl=impl), **keys)
        if row and "ratio" in row:
            copied = 2 * LOGITS * ITEM
            seen.append(f"{impl} {KERNELS[name][0] / copied / row['ratio']:.0%} of the copy rate")
        elif row:
            seen.append(f"{impl} {row['median_s'] * 1e6:.1f} µs")
    return ", ".join(seen) or "not measured"


def measured_gains(report: dict[str, Any]) -> str:
    """How many times faster than naive PyTorch and than torch.compile: the kernels, and `cpo.token_logps`."""

    def seconds(implementation: str) -> float | None:
        return find(report, "tokens", implementation, rows=ROWS, vocab=VOCAB, dtype="bfloat16").get("median_s")

    naive, compiled = seconds("naive"), seconds("compiled")
    times = {impl: (seconds(f"forward_{impl}"), seconds(f"backward_{impl}")) for impl in ("triton", "cuda")}
    ours = {impl: forward + backward for impl, (forward, backward) in times.items() if forward and backward}
    if whole := seconds("ours"):
        ours["cpo.token_logps"] = whole
    if not (naive and compiled and ours):
        return "not measured"
    return ", ".join(f"{n} {naive / t:.1f}× naive and {compiled / t:.1f}× torch.compile" for n, t in ours.items())


def measured_head(report: dict[str, Any], name: str) -> str:
    """Ratio to the products, and memory beyond inputs, gradients and one float32 dW."""
    *_, mode, implementation = STRATEGIES[name]
    keys = {"labelled": TOKENS, "hidden": HIDDEN, "vocab": VOCAB, "mode": mode, "reference": "given", "responses": 2}
    row = find(report, "head", implementation, **keys)
    if "ratio" not in row:
        return "not measured"
    (low, high), extra = row["ratio_spread"], ""
    if row["peak_bytes"] is not None:
        dx, dw = ITEM * 2 * TOKENS * HIDDEN, (ITEM + 4) * HIDDEN * VOCAB  # half of the positions are prompt
        known = {"forward": 0, "frozen": dx, "trainable": dx + dw}[mode]
        extra = f", {(row['peak_bytes'] - known) / 2**30:.2f} GiB"
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}){extra}"


def tables(report: dict[str, Any]) -> str:
    names = [d.name for d in DEVICES]
    card = report.get("environment", {}).get("gpu", "")
    measured = f"measured on {card}" if card else "measured"
    heads = " | ".join(f"floor {n}" for n in names)
    lines = [
        f"Kernels: {ROWS} × {VOCAB} bfloat16; preference of {PAIRS} pairs × {OBJECTIVES} objectives. The floor is "
        "bytes divided by the copy rate; small kernels take the few µs of a launch instead.",
        "",
        f"| kernel | MB | GFLOP | {heads} | {measured} |",
        "|---" * (4 + len(names)) + "|",
    ]
    for name, (size, flops, _) in KERNELS.items():
        floors = " | ".join(f"{kernel_floor(name, d) * 1e6:.3g} µs" for d in DEVICES)
        lines.append(
            f"| `{name}` | {size / 1e6:.3g} | {flops / 1e9:.3g} | {floors} | {measured_kernel(report, name)} |"
        )
    both = 3 * LOGITS * ITEM
    floors = " | ".join(f"{both / d.bytes_per_s * 1e6:.3g} µs" for d in DEVICES)
    lines.append(
        f"| forward, then gradient | {both / 1e6:.3g} | {7 * LOGITS / 1e9:.3g} | {floors} | {measured_gains(report)} |"
    )
    heads = " | ".join(f"products {n} | the rest {n} | expected ratio {n}" for n in names)
    lines += [
        "",
        f"Head: {TOKENS} labelled tokens, {HIDDEN} × {VOCAB}, bfloat16. Ratios are to the minimum number of products "
        "of the mode: 1 forward, 2 frozen, 3 trainable. Measured: the ratio, then peak memory beyond inputs, "
        "gradients and one float32 dW.",
        "",
        f"| strategy | products | TFLOP | {heads} | {measured} |",
        "|---" * (4 + 3 * len(names)) + "|",
    ]
    for name, (products, _, _, mode, _) in STRATEGIES.items():
        cells = []
        for device in DEVICES:
            product, kernels = head_floor(name, device)
            least = product / products * least_products(mode)
            cells += [f"{product * 1e3:.1f} ms", f"{kernels * 1e3:.2f} ms", f"{(product + kernels) / least:.2f}"]
        tflop = 2 * products * TOKENS * HIDDEN * VOCAB / 1e12
        lines.append(f"| `{name}` | {products} | {tflop:.1f} | {' | '.join(cells)} | {measured_head(report, name)} |")
    heads = " | ".join(f"products {n} | the rest {n} | × of exact products {n}" for n in names)
    shares = ", ".join(f"{live:.0%} live at {eps} ({tiles:.0%} of its tiles)" for eps, (live, tiles) in LIVE.items())
    lines += [
        "",
        f"The same head with gradients on live columns, sets of {SET_ROWS} rows, {shares}; compared with 2 exact "
        "products frozen, 3 trainable. Predicted from bytes of L2 and of memory, and operations; nothing was measured.",
        "",
        f"| dX of live columns | ε | {heads} |",
        "|---" * (2 + 3 * len(names)) + "|",
    ]
    for path, (mode, *_) in LIVE_PATHS.items():
        for eps in LIVE:
            cells = []
            for device in DEVICES:
                product, rest = live_head(path, eps, device)
                least = head_floor("forward", device)[0] * least_products(mode)
                cells += [f"{product * 1e3:.1f} ms", f"{rest * 1e3:.2f} ms", f"{(product + rest) / least:.2f}"]
            lines.append(f"| {path} | {eps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """{} where nothing was measured yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file of `cpo-kernels bench`")
    print(tables(read(parser.parse_args().results)))


if __name__ == "__main__":
    main()
