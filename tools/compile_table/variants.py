"""Every specialisation of the Triton kernels that a user can reach, as `triton.compile` takes it without a GPU."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from cpo_kernels.kernels import tuning
from cpo_kernels.kernels.live_columns import GENERAL as LIVE_GENERAL
from cpo_kernels.kernels.live_columns import gather_kernel, prepare_kernel, scan_sets_kernel, sum_sets_kernel
from cpo_kernels.kernels.live_matmul import dw_kernel, dx_kernel, pack_kernel
from cpo_kernels.kernels.preference import (
    MAX_LOSSES,
    PAIR,
    PAIR_BLOCK,
    SEQUENCE_BLOCK,
    SUM,
    TOKEN_BLOCK,
    _reward,
    aot_terms_kernel,
    aot_values_kernel,
    preference_kernel,
    sequence_sum_kernel,
)
from cpo_kernels.kernels.token_logps import ACC_TYPES, GENERAL, combine_kernel, scan_kernel, write_kernel
from cpo_kernels.reference.loss_types import LOSS_TYPES
from cpo_kernels.reference.terms import F_DIVERGENCES


class Variant(NamedTuple):
    """One specialisation of a kernel, as `triton.compile` takes it without a GPU; see triton_table.py."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: set[str]  # arguments that are multiples of 16
    launch: tuning.Launch | tuning.Tile
    wide: bool = False  # its loops must access device memory only in 16 bytes
    resident_warps: int = 0  # of 32 threads, that a multiprocessor must have registers for


def token_variants() -> Iterator[Variant]:
    """What the launches of token_logps.py can reach; what is aligned to 16 is marked as Triton would."""
    jobs: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("scan", scan_kernel, tuning.SCAN, {"SPLIT": split, "WRITE": False}) for split in (False, True)
    ]
    jobs += [("fused", scan_kernel, row_bytes, {"SPLIT": False, "WRITE": True}) for row_bytes in (1 << 16, 1 << 18)]
    jobs += [("write", write_kernel, tuning.WRITE, {"FROM_LSE": from_lse}) for from_lse in (True, False)]
    jobs += [("combine", combine_kernel, tuning.COMBINE, {})]
    for name, kernel, launch, fixed in jobs:
        free = [flag for flag in ("EDGES", "SOFTCAP", "EXTRAS") if flag in kernel.arg_names]
        optional = [("", "anchors"), *[("", "entropies")] * fixed.get("FROM_LSE", False)]
        for dtype in ("bf16", "fp16", "fp32", "fp64"):
            chosen = list(itertools.product((0, 1), repeat=len(free)))
            if "EDGES" in free:
                chosen.append((2, *(0 for _ in free[1:])))
            for values, given in itertools.product(chosen, itertools.product(*optional)):
                chosen_flags = dict(zip(free, values, strict=True))
                if any(given) and not _with_optional(dtype, chosen_flags):
                    continue
                flags = {**chosen_flags, **fixed}
                shape = launch
                if isinstance(launch, int):  # bytes of a row
                    shape = tuning.fused(launch, dtype != "fp64" and not flags["SOFTCAP"] and not flags["EXTRAS"])
                yield _token_variant(name, kernel, dtype, shape, flags, tuple(filter(None, given)))


def _with_optional(dtype: str, flags: dict[str, int]) -> bool:
    """Of the kernels with anchors or entropies: all flags, and in bfloat16 none, edges only, a softcap only."""
    return all(v == 1 for v in flags.values()) or (
        dtype == "bf16" and sum(flags.values()) < 2 and not flags.get("EXTRAS")
    )


def _token_variant(
    name: str, kernel: Any, dtype: str, launch: tuning.Launch, flags: dict[str, Any], given: tuple[str, ...]
) -> Variant:
    acc = "fp64" if dtype == "fp64" else "fp32"
    constexprs = {"ACC": ACC_TYPES[acc], "VEC": 128 // int(dtype[2:]), "LANES": launch.vectors, **flags}
    constexprs |= {n: None for n in ("anchors", "entropies") if n not in given}
    types = {"logits": "*" + dtype, "labels": "*i64"} | {n: "fp64" for n in ("nat", "c", "inner", "scale")}
    types |= {n: "i32" for n in ("stride", "rows", "width", "columns", "pieces", "ignore_index")}
    signature = {n: "constexpr" if n in constexprs else types.get(n, "*" + acc) for n in kernel.arg_names}
    aligned = {n for n, t in signature.items() if t[0] == "*" and n not in GENERAL["do_not_specialize_on_alignment"]}
    edges = flags.get("EDGES", 1)
    aligned |= {"stride", "width", "columns"} if edges == 0 else set()
    aligned -= {"logits"} if edges == 2 else set()
    named = [*(n.lower() for n, on in flags.items() if on), *given]
    label = " ".join([name, dtype, *named, *["off 16 bytes"] * (edges == 2)])
    label += f" {launch.warps} warps" if name == "fused" else ""
    kept = {n: constexprs[n] for n in signature if n in constexprs}
    plain = not any(flags.get(n) for n in ("EDGES", "SOFTCAP", "EXTRAS"))
    resident = 32 if plain else 16
    if dtype == "fp64":  # for gradient checks, not for speed
        resident = 8
    return Variant(label, kernel, signature, kept, aligned, launch, name != "combine", resident)


_DTYPES = {"lengths": "*i64", "pairs": "*i64", "order": "*i8", "counts": "*i64", "cu_seqlens": "*i64", "ties": "*i8"}
_DTYPES |= {"live_first": "*i64", "ranks": "*i64"} | {name: "i64" for name in ("N", "P", "S", "K")}
_IN_DTYPE = {"seq_logps", "ref_logps", "token_logps", "token_weights", "out", "loss", "losses", "grad"}
_IN_DTYPE |= {"chosen_rewards", "rejected_rewards", "gaps"}
_OPTIONAL = {"ref_logps", "lengths", "scores", "conditions", "objectives", "pair_weights", "pair_betas", "margins"}
_OPTIONAL |= {"extra"}


def preference_variants() -> Iterator[Variant]:
    """Both sums; every loss type with and without the optional inputs, every f-divergence, a list of MAX_LOSSES types,
    many sequences; aot's two kernels. Lists of other losses are sums of these."""
    for dtype in ("fp32", "fp64"):
        for absent, average in ((set(), True), (set(), False), ({"token_weights"}, True), ({"token_weights"}, False)):
            fixed = {"AVERAGE": average, "BLOCK": TOKEN_BLOCK}
            label = f"sequence_sum {dtype}" + "".join([" average" * average, " weights" * (not absent)])
            yield _pair_variant(label, sequence_sum_kernel, dtype, fixed, absent, SUM)
        plain = [name for name, row in LOSS_TYPES.items() if not row.couples_batch]
        lists: list[tuple[tuple[str, ...], int]] = [((name,), 0) for name in plain]
        lists += [(("sigmoid",), kind) for kind in range(1, len(F_DIVERGENCES))]
        lists += [(tuple(plain[:MAX_LOSSES]), 0), ((), 0)]  # (): only aot
        for names, kind in lists:
            for absent in (_OPTIONAL - {"extra"}, set()) if names else (set(),):
                yield _preference_variant(dtype, names, kind, absent, 1)
        yield _preference_variant(dtype, ("sigmoid",), 0, {"extra"}, 32)
        for unpaired in (False, True):
            name = "aot_unpaired" if unpaired else "aot"
            fixed = {"UNPAIRED": unpaired, "PAIR_BLOCK": PAIR_BLOCK}
            yield _pair_variant(f"{name} values {dtype}", aot_values_kernel, dtype, fixed, set(), SUM)
            if dtype == "fp64":
                for add in (False, True):
                    label = f"{name} terms" + " add" * add
                    yield _pair_variant(label, aot_terms_kernel, dtype, {**fixed, "ACCUMULATE": add}, set(), SUM)


def _preference_variant(dtype: str, names: tuple[str, ...], kind: int, absent: set[str], groups: int) -> Variant:
    fixed = {"TYPES": names, "F_DIVERGENCE": kind, "REWARD": _reward(names or ("aot",)), "PAIR_BLOCK": PAIR_BLOCK}
    fixed |= {"SEQUENCE_BLOCK": SEQUENCE_BLOCK, "SEQUENCE_BLOCKS": groups}
    label = f"preference {dtype} {'+'.join(names) or 'aot'}" + f" {F_DIVERGENCES[kind]}" * (kind > 0)
    label += ("" if absent else " all inputs") + " many sequences" * (groups > 1)
    return _pair_variant(label, preference_kernel, dtype, fixed, absent, PAIR)


def _pair_variant(
    label: str, kernel: Any, dtype: str, fixed: dict[str, Any], absent: set[str], launch: tuning.Launch
) -> Variant:
    constexprs = {n: None if n in absent else fixed[n] for n in kernel.arg_names if n in absent or n in fixed}
    numbers = {n: "fp64" for n in kernel.arg_names if kernel.signature.parameters[n].annotation == "fp64"}
    types = {**numbers, **_DTYPES} | {n: "*" + dtype for n in _IN_DTYPE}
    signature = {n: "constexpr" if n in constexprs else types.get(n, "*fp64") for n in kernel.arg_names}
    aligned = {n for n, t in signature.items() if t[0] == "*"}
    return Variant(label, kernel, signature, constexprs, aligned, launch)


def live_variants() -> Iterator[Variant]:
    """Rows whose stride and vocabulary are multiples of 16 numbers, and any; with anchors the former."""
    free = itertools.product(("bf16", "fp16", "fp32", "fp64"), (False, True), (False, True), (False, True))
    for dtype, softcap, edges, anchored in free:
        for name, kernel, launch in (
            ("scan", scan_sets_kernel, tuning.LIVE_SCAN["fp64" if dtype == "fp64" else "fp32"]),
            ("gather", gather_kernel, tuning.LIVE_GATHER),
        ):
            if anchored and (edges or (name == "scan" and not softcap)):  # that scan is the one without anchors
                continue
            flags = {"SOFTCAP": softcap, "ROWS": launch.rows, "BLOCK": launch.block, "OFFSETS": anchored}
            flags |= {} if anchored else {"anchors": None}
            options = " edges" * edges + " softcap" * softcap + " anchors" * anchored
            yield _live_variant(f"live {name} {dtype}{options}", kernel, dtype, launch, flags, not edges)
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        for aligned, labels in itertools.product((False, True), (False, True)):
            launch = tuning.live_product(int(dtype[2:]) // 8, 128, aligned)
            sizes = {"BM": launch.rows, "BV": launch.rows, "BN": launch.block, "BK": launch.depth}
            if labels and int(dtype[2:]) > 16:  # their gradients are exact
                continue
            label = f"live dx {dtype}" + " off 16 bytes" * (not aligned) + " labels" * labels
            yield _live_variant(label, dx_kernel, dtype, launch, {**sizes, "ALIGNED": aligned, "LABELS": labels}, True)
        yield _live_variant(f"live dw {dtype}", dw_kernel, dtype, launch, sizes, True)
        pack = {"BM": tuning.LIVE_PACK.rows, "BV": launch.rows}
        yield _live_variant(f"live pack {dtype}", pack_kernel, dtype, tuning.LIVE_PACK, pack, True)
        sizes = {"ROWS": tuning.LIVE_SUM.rows, "BLOCK": tuning.LIVE_SUM.block}
        for edges in (False, True):
            label = f"live sum {dtype}" + " edges" * edges
            yield _live_variant(label, sum_sets_kernel, dtype, tuning.LIVE_SUM, sizes, not edges)
    launch = tuning.LIVE_PREPARE
    for dtype in ("fp32", "fp64"):
        flags = {"ROWS": launch.block, "SOFTCAP": False, "logits": None, "anchors": None, "stride": None}
        yield _live_variant(f"live prepare {dtype}", prepare_kernel, dtype, launch, flags, True)
    for dtype, softcap in itertools.product(("bf16", "fp16", "fp32", "fp64"), (False, True)):
        label = f"live prepare {dtype}" + " softcap" * softcap + " anchors"
        flags = {"ROWS": launch.block, "SOFTCAP": softcap}
        yield _live_variant(label, prepare_kernel, dtype, launch, flags, True)


def _live_variant(
    label: str, kernel: Any, dtype: str, launch: tuning.Tile, flags: dict[str, Any], aligned: bool
) -> Variant:
    acc = "fp64" if dtype == "fp64" else "fp32"
    flags = {"ACC": ACC_TYPES[acc], **flags}
    constexprs = {n: flags[n] for n in kernel.arg_names if n in flags}
    types = {"live": "*u8", "places": "*i32"}
    types |= {n: "*" + dtype for n in ("logits", "out", "g", "weight", "dx", "packed", "x")}
    types |= {n: "*i64" for n in ("labels", "ids", "offsets", "order")}
    types |= {n: "*i64" for n in ("block_sets", "block_tiles", "tile_starts", "tile_blocks", "tile_sets")}
    types |= {n: "fp64" for n in ("threshold", "nat", "c", "inner", "scale")}
    types |= {n: "i32" for n in ("stride", "rows", "columns", "set_rows", "tiles", "blocks", "ignore_index")}
    types |= {n: "i32" for n in ("sets", "hidden", "width", "weight_stride", "steps")}
    if kernel is sum_sets_kernel:
        types |= {"tail": "*" + dtype, "made": "*" + dtype, "places": "*i64"}
    signature = {n: "constexpr" if n in constexprs else types.get(n, "*" + acc) for n in kernel.arg_names}
    off = LIVE_GENERAL["do_not_specialize_on_alignment"]
    at = {n for n, t in signature.items() if t[0] == "*" and n not in off}
    at |= {"stride", "columns", "hidden", "width", "weight_stride"} & set(kernel.arg_names) if aligned else set()
    resident = 12 if flags.get("SOFTCAP") else 20 if aligned else 16
    if dtype == "fp64" or launch.depth:
        resident = 8
    return Variant(label, kernel, signature, constexprs, at, launch, resident_warps=resident)


def variants() -> list[Variant]:
    return [*token_variants(), *preference_variants(), *live_variants()]
