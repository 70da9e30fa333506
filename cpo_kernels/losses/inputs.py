"""Inputs of a loss besides the log-probs: checked once and laid out for the `preference` kernel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cpo_kernels import checks
from cpo_kernels.checks import check_types
from cpo_kernels.losses.options import LossOptions, check_options
from cpo_kernels.objectives import Objective, check_scale
from cpo_kernels.ops.preference import PreferenceArgs
from cpo_kernels.reference.loss_types import LOSS_TYPES


class PairInputs(NamedTuple):
    """Inputs of a loss besides the log-probs, all optional. See `preference_loss`."""

    pairs: Tensor | None = None
    ref_logps: Tensor | None = None
    scores: Tensor | None = None
    conditions: Tensor | None = None
    pair_weights: Tensor | None = None
    pair_betas: Tensor | None = None
    margins: Tensor | None = None
    num_pairs: float | None = None
    chosen_tokens: float | None = None


def kernel_args(
    options: LossOptions, given: PairInputs, num_sequences: int, lengths: Tensor | None, like: Tensor
) -> PreferenceArgs:
    """Check the caller's inputs and lay them out for the `preference` kernel; `like` has dtype and device."""
    device = like.device
    divisors = {"num_pairs": given.num_pairs, "chosen_tokens": given.chosen_tokens}
    check_types("a number", optional=True, **divisors)
    check_types("a tensor", optional=True, **{n: t for n, t in given._asdict().items() if n not in divisors})
    pairs = default_pairs(num_sequences, device) if given.pairs is None else given.pairs
    check_pairs(pairs, num_sequences, device)
    if lengths is not None and lengths.device != device:
        raise ValueError(f"lengths are on {lengths.device} and the log-probs on {device}: move one of them")
    if lengths is not None and checks.may_read(lengths) and bool((lengths < 0).any()):
        raise ValueError(f"lengths must be >= 0, got {int(lengths.min())}")
    num_pairs, num_objectives = pairs.shape[0], len(options.objectives or ())
    empty, empty64 = like.new_empty(0), like.new_empty(0, dtype=torch.float64)

    def sized(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        return empty64 if value is None else in_float64(name, value, shape, device)

    if options.needs_reference and given.ref_logps is None:
        raise ValueError(
            f"loss_type {', '.join(options.types)} needs ref_logps (or ref_hidden); reference-free types are "
            f"{', '.join(t for t, row in LOSS_TYPES.items() if not row.needs_reference)}"
        )
    if not options.needs_reference and given.ref_logps is not None:
        raise ValueError(f"loss_type {', '.join(options.types)} has no reference: remove ref_logps")
    ref_logps = empty
    if given.ref_logps is not None:
        ref_logps = sized("ref_logps", given.ref_logps, (num_sequences,)).to(like.dtype)

    if (given.scores is None) != (options.objectives is None):
        missing = "scores" if given.scores is None else "objectives"
        raise ValueError(f"scores and objectives go together: {missing} are missing")
    if given.scores is None:
        for name, value in (("conditions", given.conditions), ("tau", options.tau), ("margin", options.margin or None)):
            if value is not None:
                raise ValueError(f"{name} needs scores: give scores and objectives")
    scores = sized("scores", given.scores, (num_sequences, num_objectives))
    if given.conditions is not None:
        check_domain("conditions", given.conditions)
    conditions = pair_conditions(given.conditions, pairs, num_sequences, num_objectives, device)
    objectives = empty64
    if options.objectives is not None:
        objectives = objective_rows(options.objectives, device)
        for name, value in (("scores", given.scores), ("conditions", given.conditions)):
            if value is not None:
                check_scale(name, value, options.objectives)

    for name, value in (("pair_weights", given.pair_weights), ("pair_betas", given.pair_betas)):
        if value is not None:
            check_options(options.types, {name}, options.label_smoothing or 1e-3)
    if given.margins is not None or "modpo" in options.types:
        if given.margins is None:
            raise ValueError("loss_type 'modpo' needs margins [S], the weighted other rewards of each response")
        check_options(options.types, {"margins"}, options.label_smoothing or 1e-3)
    if lengths is None and any(LOSS_TYPES[t].needs_lengths for t in options.types):
        needy = [t for t in options.types if LOSS_TYPES[t].needs_lengths]
        raise ValueError(f"loss_type {', '.join(needy)} needs lengths [S], the labelled tokens of each sequence")
    for name, value in divisors.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}: omit it to count what this call holds")
    if given.chosen_tokens is not None and not options.averages_tokens:
        raise ValueError(f"chosen_tokens does not apply to loss_type {', '.join(options.types)}")
    return PreferenceArgs(
        ref_logps,
        pairs.new_empty(0) if lengths is None else lengths,
        pairs.contiguous(),
        scores.contiguous(),
        conditions.contiguous(),
        objectives,
        sized("pair_weights", given.pair_weights, (num_pairs,)),
        sized("pair_betas", given.pair_betas, (num_pairs,)),
        sized("margins", given.margins, (num_sequences,)),
        *options.numbers(),
        -1.0 if given.num_pairs is None else float(given.num_pairs),
        float(given.chosen_tokens or -1.0) if options.averages_tokens else 1.0,
    )


def in_float64(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A checked input of numbers, detached, on the device."""
    if tuple(value.shape) != shape:
        token = name == "ref_logps" and value.dim() == 2 and value.shape[0] == shape[0] and value.shape[1] != 1
        hint = ": sum the token log-probs of each sequence, .sum(1)" if token else ""
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}{hint}")
    check_domain(name, value)
    return value.detach().to(device, torch.float64)


def check_pairs(pairs: Tensor, num_sequences: int, device: torch.device) -> None:
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        hint = ": use pairs.long()" if pairs.dim() == 2 and pairs.shape[1] == 2 else ""
        raise ValueError(f"pairs must be int64 of shape [P, 2], got {pairs.dtype} {tuple(pairs.shape)}{hint}")
    if pairs.device != device:
        raise ValueError(f"pairs are on {pairs.device} and the log-probs on {device}: move one of them")
    if checks.may_read(pairs):
        wrong = ((pairs < 0) | (pairs >= num_sequences)).any(1) | (pairs[:, 0] == pairs[:, 1])
        if bool(wrong.any()):
            p = int(wrong.nonzero()[0])
            raise ValueError(f"pair {p} is {pairs[p].tolist()}: give two different sequences in [0, {num_sequences})")


# Constraints on values; names that are not listed have none.
DOMAINS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "pair_weights": ("finite", torch.isfinite),
    "pair_betas": ("positive and finite", lambda t: t.isfinite() & (t > 0)),
}


def check_domain(name: str, value: Tensor) -> None:
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
    if name in DOMAINS and checks.may_read(value):
        words, inside = DOMAINS[name]
        wrong = ~inside(value)
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise ValueError(f"{name} must be {words}, got {value[tuple(place)].item()} at {place}")


def objective_rows(objectives: tuple[Objective, ...], device: torch.device) -> Tensor:
    """[2, K] weights and strengths; filled on the device: a copy from the host would force a synchronisation."""
    rows = torch.empty(2, len(objectives), dtype=torch.float64, device=device)
    for k, objective in enumerate(objectives):
        rows[0, k].fill_(objective.weight)
        rows[1, k].fill_(objective.strength)
    return rows


def default_pairs(num_sequences: int, device: torch.device) -> Tensor:
    """[P, 2]: sequence p of the first half with sequence p of the second, the layout of TRL and Liger."""
    if num_sequences % 2:
        raise ValueError(
            f"without pairs the first half of the sequences is paired with the second half, but {num_sequences} is "
            "odd: give pairs [P, 2]"
        )
    first = torch.arange(num_sequences // 2, device=device)
    return torch.stack([first, first + num_sequences // 2], 1)


def pair_conditions(
    conditions: Tensor | None, pairs: Tensor, num_sequences: int, num_objectives: int, device: torch.device
) -> Tensor:
    """[P, K] conditions of the pairs. [S, K] conditions of sequences must agree within a pair; P == S means [P, K]."""
    if conditions is None:
        return torch.empty(0, dtype=torch.float64, device=device)
    conditions = conditions.detach().to(device, torch.float64)
    shapes = [[pairs.shape[0], num_objectives], [num_sequences, num_objectives]]
    if list(conditions.shape) == shapes[0]:
        return conditions
    if list(conditions.shape) != shapes[1]:
        one = list(conditions.shape) in ([num_objectives], [1, num_objectives])
        hint = (
            f": use conditions.expand({shapes[0][0]}, {num_objectives}) for the same condition in every pair"
            if one
            else ""
        )
        raise ValueError(f"conditions must have shape {shapes[0]} or {shapes[1]}, got {list(conditions.shape)}{hint}")
    first, second = conditions[pairs[:, 0]], conditions[pairs[:, 1]]
    if checks.may_read(conditions):
        same = (first == second) | (first.isnan() & second.isnan())
        if not bool(same.all()):
            p = int((~same).any(1).nonzero()[0])
            raise ValueError(
                f"the responses of pair {p} {pairs[p].tolist()} have different conditions {first[p].tolist()} and "
                f"{second[p].tolist()}: a pair shares one prompt and one condition"
            )
    return first
