"""Cases of `cpo-kernels check`: sequence sums and the preference op of a backend against the float64 oracle."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import reference
from cpo_kernels.check import limits
from cpo_kernels.check.compare import Backend, Case, Findings, short
from cpo_kernels.reference.terms import OPTION_DEFAULTS

NAMES = ("loss", "losses", "gradient", "chosen_rewards", "rejected_rewards", "value_gap", "order", "counts")
TYPES = list(reference.LOSS_TYPES)
FLOATS = (torch.float32, torch.float64)
EXACT = limits.PREFERENCE[torch.float64]
OPTION_SETS: tuple[dict[str, float], ...] = (
    {},
    dict(label_smoothing=0.1),
    dict(tau=0.7, margin=0.2),
    dict(f_divergence=1),
    dict(f_divergence=2, beta=0.5),
    dict(f_divergence=3, f_alpha=0.4),
    dict(f_divergence=3, f_alpha=1.0),
    dict(simpo_gamma=1.5, alphapo_alpha=0.0, nll_alpha=0.0, modpo_weight=0.3, discopop_tau=0.5),
    dict(alphapo_alpha=0.6, nll_alpha=0.2, tie_margin=0.8),
)


def exact_sums(logps: Tensor, cu: Tensor, weights: Tensor, average: bool) -> Tensor:
    """Sums rounded once: a plain float64 sum of 70,000 terms is off by more than the kernels may be."""
    terms = (logps.double() * weights.double() if weights.numel() else logps.double()).tolist()
    tokens = cu.diff().clamp(min=1) if average else 1
    sums = [math.fsum(terms[begin:end]) for begin, end in itertools.pairwise(cu.tolist())]
    return torch.tensor(sums, dtype=torch.float64) / tokens


def sum_cases() -> Iterator[Case]:
    offsets = {
        # Empty, of one token, and long ones; tokens outside count nowhere.
        5: (torch.tensor([3, 3, 4, 1000, 1000, 70_000]), torch.tensor([0]), torch.tensor([0, 0])),
        5000: (torch.arange(5001) * 14,),  # more sequences than processors
    }
    for average, weighted, dtype, sequences in itertools.product((False, True), (False, True), FLOATS, offsets):

        def run(
            backend: Backend,
            findings: Findings,
            average: bool = average,
            weighted: bool = weighted,
            dtype: torch.dtype = dtype,
            sequences: int = sequences,
        ) -> None:
            generator = torch.Generator().manual_seed(10)
            count = 70_003
            logps = (torch.randn(count, generator=generator, dtype=torch.float64) * 10 - 5).to(dtype)
            weights = torch.rand(count if weighted else 0, generator=generator, dtype=dtype)
            for cu in offsets[sequences]:
                low, high = int(cu[0]), int(cu[-1])
                inside = weights[low:high].double()
                want = exact_sums(logps, cu, weights, average)
                scale = reference.sequence_sum(logps[low:high].double().abs(), cu - low, inside, average)
                got = backend.kernels.sequence_sum(*(t.to(backend.device) for t in (logps, cu, weights)), average)
                findings.require(f"sum has dtype {got.dtype} instead of {dtype}", got.dtype == dtype)
                eps = torch.finfo(dtype).eps
                floor = (limits.SUM_EPS64 * torch.finfo(torch.float64).eps / eps * scale).clamp(min=1e-300)
                findings.close("sum", got, want.to(backend.device), eps, floor.to(backend.device))
                findings.require("an empty sequence is not 0", not got[(cu.diff() == 0).to(backend.device)].any())
                again = backend.kernels.sequence_sum(*(t.to(backend.device) for t in (logps, cu, weights)), average)
                findings.same("sum of a second run", again, got)

        name = f"sequence_sum/{short(dtype)}/average={average},weighted={weighted},S={sequences}"
        yield Case(name, run, average and weighted)


def make_batch(
    seed: int = 0, sequences: int = 7, count: int = 11, objectives: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Arguments of `preference`: shared, unrated and unconditioned responses, with ties among the pairs."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 30, (sequences,), generator=generator)
    first = torch.randint(0, sequences, (count,), generator=generator)
    pairs = torch.stack([first, (first + torch.randint(1, sequences, (count,), generator=generator)) % sequences], 1)
    scores = torch.randint(1, 6, (sequences, objectives), generator=generator).double()
    if sequences > 5 and count > 2:
        scores[0] = math.nan  # pairs with response 0 are unrated
        scores[1, 0] = math.nan
        scores[3] = scores[2]
        pairs[:3] = torch.tensor([[0, 1], [2, 3], [5, 4]])
    conditions = torch.randint(1, 6, (count, objectives), generator=generator).double()
    conditions[uniform(count, objectives) < 0.3] = math.nan
    logps = -lengths * uniform(sequences, low=0.2, high=3.0)
    return dict(
        seq_logps=logps.to(dtype),
        ref_logps=(logps + uniform(sequences, low=-3, high=3)).to(dtype),
        lengths=lengths,
        pairs=pairs,
        scores=scores,
        conditions=conditions,
        objectives=torch.stack([uniform(objectives, low=0.5, high=2), uniform(objectives, low=0.5, high=2)]),
        pair_weights=uniform(count, low=0.2, high=2),
        pair_betas=uniform(count, low=0.05, high=0.5),
        margins=uniform(sequences, low=-1, high=1),
        loss_types=[0],
        loss_weights=[1.0],
        options=list(OPTION_DEFAULTS.values()),
        num_pairs=-1.0,
        chosen_tokens=-1.0,
    )


def without(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**batch, **{name: batch[name].new_empty(0) for name in names}}


def typed(batch: dict[str, Any], loss_type: str, **options: float) -> dict[str, Any]:
    """The batch under a loss type, with what that type does not take left out."""
    if loss_type in ("exo_pair", "robust") and not options.get("label_smoothing"):
        options = {**options, "label_smoothing": 0.02}
    values = list({**OPTION_DEFAULTS, **options}.values())
    batch = {**batch, "options": values, "loss_types": [TYPES.index(loss_type)]}
    return without(batch, "pair_weights", "pair_betas") if loss_type.startswith("aot") else batch


def check_preference(
    backend: Backend, findings: Findings, batch: dict[str, Any], tolerance: float, label: str
) -> tuple[Tensor, ...]:
    given = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    exact: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()
    }
    want = reference.preference(*exact.values())
    got: tuple[Tensor, ...] = backend.kernels.preference(*given.values())
    again = backend.kernels.preference(*given.values())
    for name, a, b, c in zip(NAMES, got, want, again, strict=True):
        findings.same(f"{label} {name} of a second run", c, a)
        if a.is_floating_point():
            findings.require(f"{label} {name} has dtype {a.dtype}", a.dtype == batch["seq_logps"].dtype)
            findings.close(f"{label} {name}", a, b.to(backend.device), tolerance)
        else:
            findings.same(f"{label} {name}", a, b.to(backend.device))
    return got


def loss_cases() -> Iterator[Case]:
    for loss_type, dtype in itertools.product(TYPES, FLOATS):

        def run(backend: Backend, findings: Findings, loss_type: str = loss_type, dtype: torch.dtype = dtype) -> None:
            tolerance = limits.PREFERENCE[dtype]
            for seed, options in enumerate(OPTION_SETS):
                batch = {**typed(make_batch(seed, dtype=dtype), loss_type, **options), "loss_weights": [0.7]}
                label = ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"
                got = check_preference(backend, findings, batch, tolerance, label)
                findings.require(f"{label}: no pair counts", got[7][0] > 0 and got[2].any())
            check_preference(
                backend, findings, {**batch, "num_pairs": 17.0, "chosen_tokens": 400.0}, tolerance, "divisors"
            )

        def many(backend: Backend, findings: Findings, loss_type: str = loss_type, dtype: torch.dtype = dtype) -> None:
            """More pairs than one block or tile holds, and more objectives."""
            batch = typed(make_batch(50, sequences=900, count=2500, objectives=9, dtype=dtype), loss_type)
            check_preference(backend, findings, batch, limits.PREFERENCE[dtype], "2500 pairs")

        quick = loss_type in ("sigmoid", "ipo", "aot", "orpo")
        yield Case(f"loss-types/{short(dtype)}/{loss_type}", run, quick)
        yield Case(f"loss-types/{short(dtype)}/{loss_type},P=2500", many, quick)


def far_cases() -> Iterator[Case]:
    """Sequence log-probs far from the reference: no overflow, no NaN, the tails of every formula."""
    for spread, loss_type in itertools.product((1.0, 60.0, 1000.0), TYPES):
        if loss_type == "discopop" and spread > 60:
            continue  # e^-u is astronomically large by definition

        def run(backend: Backend, findings: Findings, spread: float = spread, loss_type: str = loss_type) -> None:
            batch = make_batch(20)
            batch["ref_logps"] = batch["seq_logps"] + spread * torch.linspace(-1, 1, 7, dtype=torch.float64)
            batch = typed(batch, loss_type, label_smoothing=0.05)
            got = check_preference(backend, findings, batch, limits.PREFERENCE_FAR, loss_type)
            findings.require("the gradient is not finite", got[2].isfinite().all())

        yield Case(f"far/float64/{loss_type},spread={spread:g}", run, loss_type == "sigmoid" and spread > 1)


def layout_cases() -> Iterator[Case]:
    """Lists of losses, absent inputs, ties, no pairs."""

    def lists(backend: Backend, findings: Findings) -> None:
        for mix in (["sigmoid", "bco_pair", "sft"], ["simpo", "orpo"], ["contrastive_cpo"], ["aot", "hinge"], ["sft"]):
            weights = [1.0, 0.5, 2.0][: len(mix)]
            batch = {**make_batch(30), "loss_types": [TYPES.index(n) for n in mix], "loss_weights": weights}
            bare = without(batch, "pair_betas", "pair_weights")
            check_preference(backend, findings, bare, EXACT, "+".join(mix))
            check_preference(
                backend, findings, without(bare, "ref_logps", "margins"), EXACT, "+".join(mix) + " reference-free"
            )

    def absent(backend: Backend, findings: Findings) -> None:
        batch = without(make_batch(31), "scores", "conditions", "objectives")
        got = check_preference(backend, findings, batch, EXACT, "no ratings")
        findings.require("without ratings the first of a pair is not chosen", (got[6] == 1).all())
        findings.require("without ratings a gap is finite", got[5].isinf().all())
        findings.require("without ratings not every pair counts", got[7].tolist() == [11, 0, 0])
        check_preference(backend, findings, without(make_batch(32), "conditions"), EXACT, "no conditions")

    def ties(backend: Backend, findings: Findings) -> None:
        batch = without(make_batch(33), "pair_weights", "pair_betas")
        batch["pairs"] = torch.tensor([[0, 1], [2, 3], [0, 5]])  # unrated, equal, unrated
        batch["conditions"] = torch.full((3, 3), math.nan, dtype=torch.float64)
        got = check_preference(backend, findings, batch, EXACT, "ties")
        findings.require("ties give a loss or a gradient", got[0] == 0 and not got[1].any() and not got[2].any())
        findings.require("ties have an order", not got[6].any())
        findings.require("ties are not counted as 3, 2 of them unrated", got[7].tolist() == [0, 3, 2])
        findings.require("only the gap of an unrated pair is NaN", got[5].isnan().tolist() == [True, False, True])

    def no_pairs(backend: Backend, findings: Findings) -> None:
        batch = without(make_batch(34), "pair_weights", "pair_betas")
        batch["pairs"] = torch.empty(0, 2, dtype=torch.int64)
        batch["conditions"] = torch.empty(0, 3, dtype=torch.float64)
        got = check_preference(backend, findings, batch, EXACT, "no pairs")
        findings.require("no pairs give a loss or a gradient", got[0] == 0 and not got[2].any() and not got[7].any())

    def shared(backend: Backend, findings: Findings) -> None:
        """The gradient of responses in many pairs is the sum over the pairs."""
        batch = without(make_batch(35, count=40), "scores", "conditions", "objectives")
        whole = check_preference(backend, findings, {**batch, "num_pairs": 1.0}, EXACT, "40 pairs of 7 responses")[2]
        parts = torch.zeros_like(whole)
        for p in range(40):
            of_pair = {name: batch[name][p : p + 1] for name in ("pairs", "pair_weights", "pair_betas")}
            one = {**batch, **of_pair, "num_pairs": 1.0}
            parts += backend.kernels.preference(
                *(v.to(backend.device) if isinstance(v, Tensor) else v for v in one.values())
            )[2]
        findings.close("gradient", whole, parts, limits.PREFERENCE_SHARED)

    def tiles(backend: Backend, findings: Findings) -> None:
        """One pair and one more than a tile; more sequences than a block has rows; losses that couple the batch."""
        losses = ["aot", "sigmoid", "aot_unpaired", "sft", "aot"]
        for count, sequences in ((1, 7), (64, 33), (257, 100), (400, 5000)):
            batch = without(make_batch(3, sequences, max(count, 3), 6), "pair_betas")
            batch |= {name: batch[name][:count] for name in ("pairs", "conditions", "pair_weights")}
            batch |= dict(loss_types=[TYPES.index(n) for n in losses], loss_weights=[1.0, 0.5, 2.0, 0.1, 0.3])
            label = f"{count} pairs of {sequences}"
            check_preference(backend, findings, batch, EXACT, label)
            turned = {**batch, "pairs": batch["pairs"].flip(1), "num_pairs": 11.0, "chosen_tokens": 3.0}
            check_preference(backend, findings, turned, EXACT, f"{label}, turned")

    def equal_ratios(backend: Backend, findings: Findings) -> None:
        names = ("scores", "conditions", "objectives", "pair_weights", "pair_betas")
        batch = without(make_batch(36), *names)
        batch["seq_logps"] = torch.tensor([-1.0, -2.0, -1.0, -2.0, -3.0, -3.0, -3.0], dtype=torch.float64)
        batch["ref_logps"] = torch.zeros(7, dtype=torch.float64)
        batch["pairs"] = torch.tensor([[2, 3], [0, 1], [4, 5], [6, 5], [4, 6]])
        for name in ("aot", "aot_unpaired"):  # ties in the sort keep the order of the pairs
            check_preference(backend, findings, {**batch, "loss_types": [TYPES.index(name)]}, EXACT, name)

    for function in (lists, absent, ties, no_pairs, equal_ratios, shared, tiles):
        yield Case(f"pairs/float64/{function.__name__}", function, function not in (shared, tiles))


def preference_cases() -> Iterator[Case]:
    for cases in (sum_cases, loss_cases, far_cases, layout_cases):
        yield from cases()
