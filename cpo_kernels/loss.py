"""Preference losses over sequence log-probs, and fused with the head.

`preference_loss`, `CPOLoss` and `FusedLinearCPOLoss` take the same options (`LossOptions`); the table of loss types and
of the options that each honours is `LOSS_TYPES`. CPO here is Controllable Preference Optimization (Guo et al. 2024,
arXiv 2402.19085); Contrastive Preference Optimization (Xu et al. 2024) is loss type "contrastive_cpo".
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpo_kernels import ops
from cpo_kernels.batch_plan import BatchPlan, Layout
from cpo_kernels.checks import check_list, check_types
from cpo_kernels.linear import HeadInputs, head_inputs, token_logps_of
from cpo_kernels.linear_preference import linear_preference, wpo_weights
from cpo_kernels.objectives import Objective
from cpo_kernels.planner import budget_rows
from cpo_kernels.reference import F_DIVERGENCES, LOSS_TYPES, OPTIONS, check_options, ld_token_weights
from cpo_kernels.sharded import VocabShards


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. Everything but `loss` is detached."""

    loss: Tensor  # [], sum of weight * loss over the pairs that are no ties / num_pairs
    losses: Tensor  # [P], 0 for ties
    seq_logps: Tensor  # [S]
    chosen_rewards: Tensor  # [P], beta * (L - ref) of the response that the loss preferred
    rejected_rewards: Tensor  # [P]
    accuracy: Tensor  # [], share of non-tie pairs whose chosen reward is the higher
    margin: Tensor  # [], mean of chosen - rejected reward over the non-tie pairs
    value_gap: Tensor  # [P], R(first) - R(second); NaN where no objective is rated on both sides, inf without scores
    order: Tensor  # [P] int8, +1 the first of the pair is chosen, -1 the second, 0 a tie
    num_pairs: Tensor  # [] int64, pairs that are no ties
    num_ties: Tensor  # [] int64, ties, unrated pairs among them
    num_unrated: Tensor  # [] int64, pairs without an objective that is rated on both sides


@dataclass(frozen=True)
class LossOptions:
    """Options of the preference losses. A combination that a loss type would ignore raises ValueError.

    objectives: the objectives that `scores` rate; needed with scores.
    beta: inverse temperature; tau of IPO.
    loss_type: a name of `LOSS_TYPES`, or several, weighted by `loss_weights` (1 each by default).
    label_smoothing: probability that a label is flipped (conservative DPO; robust, exo_pair, aot).
    tau: soft targets q = sigmoid(|dR| / tau); None for hard ones.
    margin: gamma of the margin gamma * |dR| (ODPO).
    tie_margin: pairs with |dR| at most this are ties: no loss, no gradient, counted.
    f_divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence with coefficient f_alpha.
    ld_alpha: weight of the tokens past the pair's shorter length (LD-DPO); None for 1. Needs disjoint pairs.
    use_weighting: WPO weights, the product of both responses' mean aligned probabilities.
    """

    objectives: tuple[Objective, ...] | None = None
    beta: float = 0.1
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    tau: float | None = None
    margin: float = 0.0
    tie_margin: float = 1e-6
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    nll_alpha: float = 1.0
    modpo_weight: float = 1.0
    ld_alpha: float | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        types = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        check_list("loss_type", types, str, "names of LOSS_TYPES")
        types = tuple(types)
        object.__setattr__(self, "loss_type", types)
        check_types("a number", **{f.name: getattr(self, f.name) for f in fields(self) if isinstance(f.default, float)})
        check_types("a number", optional=True, tau=self.tau, ld_alpha=self.ld_alpha)
        check_list("objectives", () if self.objectives is None else self.objectives, Objective, "Objective")
        check_list("loss_weights", () if self.loss_weights is None else self.loss_weights, (int, float), "numbers")
        weights = (1.0,) * len(types) if self.loss_weights is None else tuple(map(float, self.loss_weights))
        object.__setattr__(self, "loss_weights", weights)
        if self.objectives is not None:
            object.__setattr__(self, "objectives", tuple(self.objectives))
        if len(weights) != len(types):
            raise ValueError(f"loss_weights {weights} must have one number per loss type {types}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        for name in ("tau", "modpo_weight", "discopop_tau"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.tie_margin < 0 or self.margin < 0:
            raise ValueError(f"tie_margin and margin must be >= 0, got {self.tie_margin} and {self.margin}")
        if self.f_divergence not in F_DIVERGENCES:
            raise ValueError(f"f_divergence must be one of {', '.join(F_DIVERGENCES)}, got {self.f_divergence!r}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must lie in [0, 1], got {self.ld_alpha}")
        defaults = {f.name: f.default for f in fields(self)}
        always = {"objectives", "beta", "loss_type", "loss_weights", "tie_margin"}
        given = {n for n in defaults if n not in always and getattr(self, n) != defaults[n]}
        if "f_alpha" in given:
            given.remove("f_alpha")
            if self.f_divergence != "alpha_divergence":
                raise ValueError(f"f_alpha has a meaning with f_divergence='alpha_divergence' only, got {self.f_alpha}")
        check_options(types, given, self.label_smoothing)

    @classmethod
    def of(cls, options: dict[str, Any]) -> "LossOptions":
        """Options by name; an unknown name is an error that offers the nearest."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; one of {', '.join(known)}"
                raise TypeError(f"unknown option {name!r}{hint}")
        return cls(**options)

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(self.loss_type)

    @property
    def needs_reference(self) -> bool:
        return any(LOSS_TYPES[t].needs_reference for t in self.types)

    @property
    def couples_pairs(self) -> bool:
        return any(LOSS_TYPES[t].couples_batch for t in self.types)

    @property
    def averages_tokens(self) -> bool:
        """Whether a term is a mean over the tokens of all chosen responses."""
        return not {"sft", "orpo", "contrastive_cpo"}.isdisjoint(self.types)

    def numbers(self) -> tuple[list[int], list[float], list[float]]:
        """(loss type ids, weights, options) as the kernels take them."""
        names = list(LOSS_TYPES)
        values = {name: getattr(self, name) for name in OPTIONS}
        values["f_divergence"] = F_DIVERGENCES.index(self.f_divergence)
        values["tau"] = self.tau or 0.0
        options = [float(values[name]) for name in OPTIONS]
        return [names.index(t) for t in self.types], list(self.loss_weights or ()), options


class PairInputs(NamedTuple):
    """What a call of a loss takes beside the log-probs; all optional. See `preference_loss`."""

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
) -> tuple[Any, ...]:
    """Check what the caller gave and lay it out as the `preference` kernel takes it; `like` has dtype and device."""
    device = like.device
    divisors = {"num_pairs": given.num_pairs, "chosen_tokens": given.chosen_tokens}
    check_types("a number", optional=True, **divisors)
    check_types("a tensor", optional=True, **{n: t for n, t in given._asdict().items() if n not in divisors})
    pairs = default_pairs(num_sequences, device) if given.pairs is None else given.pairs
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be int64 of shape [P, 2], got {pairs.dtype} {tuple(pairs.shape)}")
    if pairs.device != device:
        raise ValueError(f"pairs are on {pairs.device} and the log-probs on {device}: move one of them")
    if not torch.compiler.is_compiling() and (device.type == "cpu" or ops.checks_enabled()):
        wrong = ((pairs < 0) | (pairs >= num_sequences)).any(1) | (pairs[:, 0] == pairs[:, 1])
        if bool(wrong.any()):
            p = int(wrong.nonzero()[0])
            raise ValueError(f"pair {p} is {pairs[p].tolist()}: give two different sequences in [0, {num_sequences})")
    num_pairs, num_objectives = pairs.shape[0], len(options.objectives or ())
    empty, empty64 = like.new_empty(0), like.new_empty(0, dtype=torch.float64)

    def sized(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        if value is None:
            return empty64
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
        return value.detach().to(device, torch.float64)

    if options.needs_reference and given.ref_logps is None:
        raise ValueError(
            f"loss_type {', '.join(options.types)} needs ref_logps (or ref_hidden); reference-free types are "
            f"{', '.join(t for t, row in LOSS_TYPES.items() if not row.needs_reference)}"
        )
    if not options.needs_reference and given.ref_logps is not None:
        raise ValueError(f"loss_type {', '.join(options.types)} has no reference: leave ref_logps out")
    ref_logps = empty
    if given.ref_logps is not None:
        ref_logps = sized("ref_logps", given.ref_logps, (num_sequences,)).to(like.dtype)

    if (given.scores is None) != (options.objectives is None):
        missing = "scores" if given.scores is None else "objectives"
        raise ValueError(f"scores and objectives go together: {missing} are missing")
    if given.scores is None:
        for name, value in (("conditions", given.conditions), ("tau", options.tau), ("margin", options.margin or None)):
            if value is not None:
                raise ValueError(f"{name} has a meaning with scores only: give scores and objectives")
    scores = sized("scores", given.scores, (num_sequences, num_objectives))
    conditions = pair_conditions(given.conditions, pairs, num_sequences, num_objectives, device)
    objectives = empty64 if options.objectives is None else objective_rows(options.objectives, device)

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
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}: leave it out to count what is here")
    if given.chosen_tokens is not None and not options.averages_tokens:
        raise ValueError(f"chosen_tokens has no meaning for loss_type {', '.join(options.types)}")
    return (
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


def objective_rows(objectives: tuple[Objective, ...], device: torch.device) -> Tensor:
    """[2, K] weights and strengths; filled on the device, as a copy from the host would make it wait."""
    rows = torch.empty(2, len(objectives), dtype=torch.float64, device=device)
    for k, objective in enumerate(objectives):
        rows[0, k].fill_(objective.weight)
        rows[1, k].fill_(objective.strength)
    return rows


def default_pairs(num_sequences: int, device: torch.device) -> Tensor:
    """[P, 2]: sequence p of the first half with sequence p of the second, as TRL and Liger lay them out."""
    if num_sequences % 2:
        raise ValueError(
            f"without pairs the first half of the sequences is paired with the second half: {num_sequences} "
            "sequences are an odd number, give pairs [P, 2]"
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
        raise ValueError(f"conditions must have shape {shapes[0]} or {shapes[1]}, got {list(conditions.shape)}")
    first, second = conditions[pairs[:, 0]], conditions[pairs[:, 1]]
    if not torch.compiler.is_compiling() and (device.type == "cpu" or ops.checks_enabled()):
        same = (first == second) | (first.isnan() & second.isnan())
        if not bool(same.all()):
            p = int((~same).any(1).nonzero()[0])
            raise ValueError(
                f"the responses of pair {p} {pairs[p].tolist()} have different conditions {first[p].tolist()} and "
                f"{second[p].tolist()}: a pair shares one prompt and one condition"
            )
    return first


def output(loss: Tensor, losses: Tensor, seq_logps: Tensor, metrics: Sequence[Tensor]) -> PreferenceOutput:
    """`metrics` are chosen_rewards, rejected_rewards, value_gap, order, counts."""
    chosen, rejected, gap, order, counts = metrics
    counted = (order != 0).to(chosen.dtype)
    num = counted.sum().clamp(min=1)
    accuracy = ((chosen > rejected) * counted).sum() / num
    margin = (torch.where(order != 0, chosen - rejected, 0.0)).sum() / num
    return PreferenceOutput(
        loss, losses, seq_logps.detach(), chosen, rejected, accuracy, margin, gap, order, *counts.unbind(0)
    )


class CPOLoss(nn.Module):
    """`preference_loss` with its options fixed: `CPOLoss(objectives, beta=0.1)(seq_logps, ...)`."""

    def __init__(
        self,
        objectives: Sequence[Objective] | None = None,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        impl: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = LossOptions.of({"objectives": objectives, "beta": beta, "loss_type": loss_type, **options})
        ops.check_impl(impl)
        self.impl = impl

    def forward(
        self,
        seq_logps: Tensor,
        pairs: Tensor | None = None,
        ref_logps: Tensor | None = None,
        scores: Tensor | None = None,
        conditions: Tensor | None = None,
        lengths: Tensor | None = None,
        pair_weights: Tensor | None = None,
        pair_betas: Tensor | None = None,
        margins: Tensor | None = None,
        num_pairs: float | None = None,
        chosen_tokens: float | None = None,
    ) -> PreferenceOutput:
        """See `preference_loss`."""
        ops.refuse_transforms()
        check_types("a tensor", seq_logps=seq_logps)
        check_types("a tensor", optional=True, lengths=lengths)
        if seq_logps.dim() != 1 or seq_logps.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "seq_logps must be float32 or float64 of shape [S] (a 16-bit sum is off by whole nats), got "
                f"{seq_logps.dtype} {tuple(seq_logps.shape)}"
            )
        for option in ("ld_alpha", "use_weighting"):
            if getattr(self.options, option):
                raise ValueError(
                    f"{option} works on token log-probs: use FusedLinearCPOLoss, or fold it into seq_logps "
                    "(ld_alpha) or pair_weights (WPO) yourself"
                )
        if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != seq_logps.shape):
            raise ValueError(
                f"lengths must be int64 of shape {list(seq_logps.shape)}, got {lengths.dtype} {list(lengths.shape)}"
            )
        divisors = num_pairs, chosen_tokens
        given = PairInputs(pairs, ref_logps, scores, conditions, pair_weights, pair_betas, margins, *divisors)
        args = kernel_args(self.options, given, seq_logps.shape[0], lengths, seq_logps)
        loss, losses, *metrics = ops.preference(seq_logps.contiguous(), args, self.impl)
        return output(loss, losses, seq_logps, metrics)


def preference_loss(
    seq_logps: Tensor,
    pairs: Tensor | None = None,
    ref_logps: Tensor | None = None,
    scores: Tensor | None = None,
    conditions: Tensor | None = None,
    objectives: Sequence[Objective] | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    pair_betas: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: float | None = None,
    chosen_tokens: float | None = None,
    impl: str = "auto",
    **options: Any,
) -> PreferenceOutput:
    """Multi-objective conditioned preference loss over sequence log-probs, gradient made in the same pass.

    For each pair the response with the higher value R under the pair's condition is chosen, with
    R(y) = sum_i w_i g_i(y) / sum_i w_i, g_i = -strength_i |P_i(y) - c_i| where c_i is given, else P_i(y); the default
    loss is -log sigmoid(beta * ((L_w - ref_w) - (L_l - ref_l))). Without ratings the first of each pair is chosen.

    Args:
        seq_logps: [S] float32 or float64.
        pairs: [P, 2] int64 into the sequences; one response may stand in many pairs. None pairs the first half of the
            sequences with the second.
        ref_logps: [S], of the reference model under the same (prompt, condition).
        scores: [S, K] ratings, NaN where missing: an objective that is not rated on both sides leaves the pair.
        conditions: [P, K], or [S, K] where both responses of a pair agree; NaN where not conditioned.
        objectives: the K objectives.
        lengths: [S] int64 labelled tokens, for the types that average or count tokens.
        pair_weights, pair_betas: [P].
        margins: [S], MODPO's weighted other rewards of each response.
        num_pairs: divisor of the loss instead of the number of non-tie pairs here: the global count under gradient
            accumulation or several processes.
        chosen_tokens: the same for the terms that average over the tokens of all chosen responses (sft, and the NLL of
            orpo and contrastive_cpo).
        **options: see `LossOptions`.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device or option, an option that a loss type would ignore.
        RuntimeError: a home asked for by name that is not there; double backward.

    Source: Guo et al. 2024 (arXiv 2402.19085); each type's own in `LOSS_TYPES[name].formula`.
    """
    loss_fn = CPOLoss(objectives, beta, loss_type, impl, **options)
    tensors = (pairs, ref_logps, scores, conditions, lengths, pair_weights, pair_betas, margins)
    return loss_fn(seq_logps, *tensors, num_pairs, chosen_tokens)


@ops.functional_op("ld_token_weights")
def _ld_weights_op(
    labels: Tensor, cu_seqlens: Tensor, lengths: Tensor, pairs: Tensor, ld_alpha: float, ignore_index: int
) -> Tensor:
    """LD-DPO's token weights [M] over the full layout: `ld_alpha` past the pair's shorter length, 1 elsewhere."""
    if labels.device.type == "cpu" or ops.checks_enabled():
        ld_token_weights(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), pairs, ld_alpha)  # raises on conflicts
    shared = lengths.clone()
    shared[pairs] = lengths[pairs].amin(1, keepdim=True).expand(-1, 2)
    labelled = labels != ignore_index
    rank = labelled.cumsum(0)  # 1 for the first label of the batch
    before = torch.cat([rank.new_zeros(1), rank])[cu_seqlens[:-1]]  # [S] labels before each sequence
    last = (before + shared).repeat_interleave(cu_seqlens.diff(), output_size=labels.shape[0])
    return torch.where(labelled & (rank > last), ld_alpha, torch.ones_like(rank, dtype=torch.float64))


@torch.library.register_fake("cpo_kernels::ld_token_weights")
def _(labels, cu_seqlens, lengths, pairs, ld_alpha, ignore_index):
    return labels.new_empty(labels.shape, dtype=torch.float64)


class FusedLinearCPOLoss(nn.Module):
    """`preference_loss` from hidden states: the head's log-probs, the loss and all gradients, logits never stored.

    With a trainable head 3 matrix products where a group of linked pairs fits the memory budget (else 4), with a frozen
    one 2, without gradients 1; on labelled rows alone. See `explain` for the plan of a shape.

    Args:
        objectives, beta, loss_type, **options: see `preference_loss` and `LossOptions`.
        ignore_index, softcap, scale, vocab_size, memory_budget, impl: see `linear_token_logps`.

    Example:
        >>> loss_fn = FusedLinearCPOLoss(beta=0.1)
        >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(16, 8, requires_grad=True)
        >>> out = loss_fn(hidden, weight, torch.randint(16, (2, 3)), ref_logps=torch.zeros(2))
        >>> out.loss.backward()
    """

    def __init__(
        self,
        objectives: Sequence[Objective] | None = None,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        ignore_index: int = -100,
        softcap: float | None = None,
        scale: float = 1.0,
        vocab_size: int | None = None,
        memory_budget: int | None = None,
        impl: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = LossOptions.of({"objectives": objectives, "beta": beta, "loss_type": loss_type, **options})
        self.head = (ignore_index, softcap, scale, vocab_size, memory_budget)
        ops.check_impl(impl)
        self.impl = impl

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        pairs: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        scores: Tensor | None = None,
        conditions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        pair_weights: Tensor | None = None,
        pair_betas: Tensor | None = None,
        margins: Tensor | None = None,
        num_pairs: float | None = None,
        chosen_tokens: float | None = None,
        plan: BatchPlan | None = None,
        vocab_shards: VocabShards | None = None,
    ) -> PreferenceOutput:
        """hidden [S, T, H] with labels [S, T], or packed [N, H] and [N] with cu_seqlens [S + 1]; both already shifted.

        ref_hidden has the layout of `hidden` and goes through `ref_weight` (`weight` if None) and `ref_bias` (`bias` if
        both are None); where that is the policy's own head, one product serves both. `plan` comes from the method of
        that name, holds the pairs, and keeps the host from waiting for a GPU. DTensors, and vocab_shards (of weight and
        ref_weight): see `linear_token_logps`. The rest: see `preference_loss`.
        """
        inputs = head_inputs(hidden, weight, labels, bias, *self.head, vocab_shards)
        check_types("a tensor", optional=True, pairs=pairs, ref_hidden=ref_hidden, cu_seqlens=cu_seqlens)
        ops.resolve_impl(self.impl, hidden.device)
        cu_seqlens = sequence_offsets(hidden, labels, cu_seqlens)
        lengths = label_counts(inputs.labels, cu_seqlens, inputs.options.ignore_index)
        num_sequences = lengths.shape[0]
        own_weight = weight if ref_weight is None else ref_weight
        own_bias = bias if ref_weight is None and ref_bias is None else ref_bias
        shared = ref_hidden is not None and own_weight is weight and own_bias is bias
        if plan is not None:
            check_plan(plan, inputs, num_sequences, pairs)
            pairs = plan.pairs
            num_pairs = plan.num_pairs if num_pairs is None else num_pairs
            if chosen_tokens is None and self.options.averages_tokens:
                chosen_tokens = plan.chosen_tokens
        elif pairs is None:
            pairs = default_pairs(num_sequences, hidden.device)
        acc = ops.acc_dtype(inputs.hidden.dtype)
        token_weights = inputs.hidden.new_empty(0, dtype=acc)
        if self.options.ld_alpha is not None:
            token_weights = _ld_weights_op(
                inputs.labels, cu_seqlens, lengths, pairs, self.options.ld_alpha, inputs.options.ignore_index
            ).to(acc)
        ref_rows = None
        if ref_hidden is not None:
            if ref_logps is not None:
                raise ValueError("give ref_logps or ref_hidden, not both")
            if ref_hidden.shape[:-1] != hidden.shape[:-1]:
                raise ValueError(
                    f"ref_hidden must have shape {list(hidden.shape[:-1])} + [H], got {list(ref_hidden.shape)}"
                )
            if shared:  # already in the dtype of the products
                own_weight, own_bias = inputs.weight, inputs.bias if inputs.bias.numel() else None
            with torch.no_grad():
                shards = inputs.shards if shared else vocab_shards
                ref = head_inputs(ref_hidden, own_weight, labels, own_bias, *self.head, shards)
                if shared:
                    ref_rows, ref_logps = ref.hidden, token_weights.new_zeros(num_sequences)  # filled with the policy's
                else:
                    ref_token_logps, *_ = token_logps_of(ref, False, self.impl, None if plan is None else plan.index)
                    ref_logps = ops.sequence_logps_op(
                        ref_token_logps, cu_seqlens, token_weights.to(ref_token_logps.dtype), False, self.impl
                    )
        elif ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias have a meaning with ref_hidden only")
        divisors = num_pairs, chosen_tokens
        given = PairInputs(pairs, ref_logps, scores, conditions, pair_weights, pair_betas, margins, *divisors)
        args = kernel_args(self.options, given, num_sequences, lengths, token_weights)
        if not inputs.train_head:
            return self.from_token_logps(inputs, cu_seqlens, lengths, token_weights, args, plan, ref_rows)
        none = labels.new_empty(0)
        loss, losses, seq_logps, *metrics = linear_preference(
            inputs,
            token_weights,
            inputs.hidden.new_empty(0) if ref_rows is None else ref_rows,
            args,
            self.options.use_weighting,
            self.options.couples_pairs,
            (none.cpu(), none, none) if plan is None else (plan.host, plan.index, plan.tables),
            self.impl,
        )
        return output(loss, losses, seq_logps, metrics)

    def from_token_logps(
        self,
        inputs: HeadInputs,
        cu_seqlens: Tensor,
        lengths: Tensor,
        token_weights: Tensor,
        args: tuple[Any, ...],
        plan: BatchPlan | None,
        ref_rows: Tensor | None,
    ) -> PreferenceOutput:
        """Strategies `frozen` and `forward`: dX is kept per token, so any loss may follow."""
        weighted = self.options.use_weighting
        index = None if plan is None else plan.index
        logp, extra, ref_logp = token_logps_of(inputs, weighted, self.impl, index, ref_rows)
        seq_logps = ops._SequenceLogps.apply(logp, cu_seqlens, token_weights, False, self.impl)
        if ref_rows is not None:
            args = (ops.sequence_logps_op(ref_logp, cu_seqlens, token_weights, False, self.impl), *args[1:])
        if weighted:
            aligned = (logp - extra[1]).detach()
            sums = ops.sequence_logps_op(aligned, cu_seqlens, aligned.new_empty(0), False, self.impl)
            wpo = wpo_weights(sums, lengths, args[2])
            args = (*args[:6], args[6] * wpo if args[6].numel() else wpo, *args[7:])
        loss, losses, *metrics = ops.preference(seq_logps, args, self.impl)
        return output(loss, losses, seq_logps, metrics)

    def plan(
        self,
        labels: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        pairs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scores: Tensor | None = None,
        conditions: Tensor | None = None,
        device: str | torch.device = "cuda",
        all_positions: bool = False,
    ) -> BatchPlan:
        """What the loss must know of a batch on the host, from the collator's CPU tensors; `.to(device)` before use.

        With it nothing between the hidden states and `loss.backward()` waits for a GPU. Without it the loss copies
        lengths and pairs from the device once.

        Args:
            labels, pairs, cu_seqlens, scores, conditions: as in the call, on the CPU. Scores and conditions are needed
                where a trainable head takes several chunks: how many pairs are no ties is the divisor of each.
            vocab_size: rows of the head's weight; of a sharded head, of its largest shard.
            dtype: of the head's products (autocast's, under autocast).
            device: where the loss will run.
            all_positions: every position counts as a row, labelled or not: labels may then change from one replay of a
                CUDA graph to the next, at the price of the products of the ignored ones.
        """
        for name, tensor in {"labels": labels, "pairs": pairs, "cu_seqlens": cu_seqlens, "scores": scores}.items():
            if tensor is not None and tensor.device.type != "cpu":
                raise ValueError(f"a plan is made from CPU tensors, got {name} on {tensor.device}")
        ignore_index, memory_budget = self.head[0], self.head[4]
        limit = budget_rows(vocab_size, dtype, torch.device(device), memory_budget)
        offsets = sequence_offsets(labels, labels, cu_seqlens)
        flat = labels.reshape(-1)
        lengths = label_counts(flat, offsets, ignore_index)
        pairs = default_pairs(lengths.shape[0], labels.device) if pairs is None else pairs
        num_pairs = chosen_tokens = None
        if not all_positions and (scores is not None or self.options.objectives is None):
            plain = LossOptions(self.options.objectives, loss_type="sft", tie_margin=self.options.tie_margin)
            given = PairInputs(pairs, scores=scores, conditions=conditions)
            zeros = torch.zeros(lengths.shape[0], dtype=torch.float64)
            order, counts = ops.preference(zeros, kernel_args(plain, given, len(zeros), lengths, zeros), "auto")[-2:]
            chosen = pairs.gather(1, (order < 0).long()[:, None]).squeeze(1)
            num_pairs = max(1.0, float(counts[0]))
            chosen_tokens = max(1.0, float((lengths[chosen] * (order != 0)).sum()))
        rows = offsets.diff() if all_positions else lengths
        flat_pairs = pairs.flatten().tolist()
        layout = Layout.of(rows.tolist(), flat_pairs, limit, self.options.couples_pairs)
        index = torch.arange(len(flat)) if all_positions else (flat != ignore_index).nonzero().squeeze(1)
        return BatchPlan(layout, layout.pack(), index, layout.tables(), pairs, len(flat), num_pairs, chosen_tokens)


def check_plan(plan: BatchPlan, inputs: HeadInputs, num_sequences: int, pairs: Tensor | None) -> None:
    """The plan's numbers are host values: comparing them waits for nothing."""
    if pairs is not None:
        raise ValueError("give pairs or plan, not both: the plan holds the pairs it was made with")
    positions = inputs.labels.shape[0]
    if (plan.num_positions, len(plan.layout.lengths)) != (positions, num_sequences):
        raise ValueError(
            f"the plan was made for {len(plan.layout.lengths)} sequences in {plan.num_positions} positions, got "
            f"{num_sequences} in {positions}: make one for each batch"
        )
    if plan.index.device != inputs.labels.device:
        raise ValueError(f"the plan is on {plan.index.device} and labels on {inputs.labels.device}: use plan.to(...)")
    if plan.layout.row_limit != inputs.row_limit:
        raise ValueError(
            f"the plan was made for chunks of {plan.layout.row_limit} rows, this head takes {inputs.row_limit}: give "
            f"plan() its vocab_size {inputs.width}, dtype {inputs.weight.dtype} and device"
        )


def sequence_offsets(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S + 1] offsets of the sequences in the flattened rows: given for packed input, multiples of T for padded."""
    if labels.dim() == 2 and cu_seqlens is None:
        num_sequences, length = labels.shape
        return torch.arange(num_sequences + 1, device=hidden.device) * length
    if labels.dim() == 1 and cu_seqlens is not None:
        ops.check_cu_seqlens(cu_seqlens, labels.shape[0])
        return cu_seqlens.to(hidden.device)
    raise ValueError(
        "give padded hidden [S, T, H] with labels [S, T], or packed hidden [N, H] with labels [N] and cu_seqlens "
        f"[S + 1]; got labels {list(labels.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
    )


def label_counts(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """[S] labelled rows of each sequence."""
    labelled = (labels != ignore_index).long()
    before = torch.cat([labelled.new_zeros(1), labelled.cumsum(0)])
    return before[cu_seqlens].diff()
