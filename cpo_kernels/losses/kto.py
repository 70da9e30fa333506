"""`kto_loss` fused with the head: unpaired responses, from hidden states to the loss and all gradients."""

from __future__ import annotations  # some builds of torch have no process groups

import inspect
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpo_kernels import checks
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.checks import check_types
from cpo_kernels.head.inputs import HeadConfig, HeadInputs, head_inputs
from cpo_kernels.head.kto import KTOArgs, LinearKTOArgs, linear_kto
from cpo_kernels.head.live import filter_shares
from cpo_kernels.head.strategy import check_filter
from cpo_kernels.head.token_logps import token_logps_of
from cpo_kernels.library import acc_dtype
from cpo_kernels.losses.inputs import in_float64
from cpo_kernels.losses.sequences import PolicyHead, ReferenceModel, label_counts, reference_rows, sequence_offsets
from cpo_kernels.ops.sequence_logps import SequenceLogps
from cpo_kernels.reference.kto import check_kto, kto_kl


class UnpairedType(NamedTuple):
    formula: str  # r = L - ref
    source: str
    has_kl: bool  # a reference point; else it is 0


LOSS_TYPES = {
    "kto": UnpairedType(
        "desirable_weight (1 - sigmoid(beta (r - kl))), or undesirable_weight (1 - sigmoid(beta (kl - r)))",
        "KTO, Ethayarajh et al. 2024 (arXiv 2402.01306) eq. 7.",
        True,
    ),
    "apo_zero_unpaired": UnpairedType(
        "desirable_weight (1 - sigmoid(beta r)), or undesirable_weight sigmoid(beta r)",
        "The two terms of APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266) eq. 7, one of each response.",
        False,
    ),
}


class KTOOutput(NamedTuple):
    """Result of `FusedLinearKTOLoss`. Everything but `loss` is detached."""

    loss: Tensor  # [], sum of the losses / num_sequences
    losses: Tensor  # [S]
    seq_logps: Tensor  # [S]
    rewards: Tensor  # [S], beta * (L - ref)
    desirable_reward: Tensor  # [], mean reward of the desirable responses, NaN without any
    undesirable_reward: Tensor  # [], of the others
    margin: Tensor  # [], desirable_reward - undesirable_reward
    kl: Tensor  # [], the reference point
    # See `PreferenceOutput`:
    live_share: Tensor  # []
    tail_mass: Tensor  # []
    exact_share: Tensor  # []


class _Sequences(NamedTuple):
    """The sequences of a batch, and the reference model's hidden states or log-probs."""

    inputs: HeadInputs
    offsets: Tensor  # [S + 1] first position of each
    lengths: Tensor  # [S] labelled positions of each
    ref_rows: Tensor | None  # [M, H] for the policy's head
    ref_logps: Tensor  # [S] in float64; 0 where ref_rows are given


class FusedLinearKTOLoss(nn.Module):
    """KTO from hidden states: the head's log-probs, the loss and all gradients, without storing logits.

    With r = L - ref of a response, its loss is desirable_weight (1 - sigmoid(beta (r - kl))) where it is desirable and
    undesirable_weight (1 - sigmoid(beta (kl - r))) where not (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7). Matrix
    products, on labelled rows only: 3 with a trainable head (4 for a response longer than the memory budget), 2 with a
    frozen head, 1 without gradients.

    Args:
        beta: inverse temperature.
        desirable_weight, undesirable_weight: weights of the two kinds of responses, >= 0.
        loss_type: "kto", or "apo_zero_unpaired", which has no reference point: kl is 0.
        average_log_prob: L and ref per labelled token; given ref_logps too must be means.
        ignore_index, softcap, scale, vocab_size, memory_budget, impl, filter_eps, filter_head_grad: see
            `linear_token_logps`.

    Raises:
        TypeError, ValueError: a wrong option; in the call, wrong dtypes, shapes, devices or, on the CPU, labels.
        RuntimeError: a backend requested by name that is not available; double backward.

    Examples:
        >>> loss_fn = FusedLinearKTOLoss(beta=0.1)
        >>> hidden, weight = torch.randn(3, 5, 8), torch.randn(16, 8, requires_grad=True)
        >>> labels, desirable = torch.randint(16, (3, 5)), torch.tensor([True, False, True])
        >>> kl = loss_fn.kl(hidden, weight, labels.roll(1, 0), ref_logps=torch.full((3,), -20.0))
        >>> out = loss_fn(hidden, weight, labels, desirable=desirable, kl=kl, ref_logps=torch.full((3,), -20.0))
        >>> out.loss.backward()
    """

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
        average_log_prob: bool = False,
        ignore_index: int = -100,
        softcap: float | None = None,
        scale: float = 1.0,
        vocab_size: int | None = None,
        memory_budget: int | None = None,
        impl: str = "auto",
        filter_eps: float | Literal["auto"] | None = None,
        filter_head_grad: bool = False,
    ) -> None:
        super().__init__()
        numbers: dict[str, Any] = {
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }
        check_types("a number", **numbers)
        for name, number in numbers.items():
            if not (math.isfinite(number) and (number > 0 if name == "beta" else number >= 0)):
                kind = "positive" if name == "beta" else ">= 0"
                raise ValueError(f"{name} must be {kind} and finite, got {number}")
        if not isinstance(loss_type, str) or loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}: losses of pairs are "
                "FusedLinearCPOLoss's"
            )
        if not isinstance(average_log_prob, bool):
            raise TypeError(f"average_log_prob must be True or False, got {average_log_prob!r}")
        check_filter(filter_eps, filter_head_grad)
        dispatch.check_impl(impl)
        self.beta, self.desirable_weight, self.undesirable_weight = map(float, numbers.values())
        self.loss_type, self.average_log_prob, self.impl = loss_type, average_log_prob, impl
        self.head = HeadConfig(ignore_index, softcap, scale, vocab_size, memory_budget, filter_eps, filter_head_grad)

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and always beta and loss type."""
        given: dict[str, Any] = {**vars(self), **self.head._asdict()}
        options = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        shown = ("beta", "loss_type")
        return ", ".join(f"{n}={given[n]!r}" for n in options if n in shown or given[n] != options[n])

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        desirable: Tensor,
        kl: Tensor | float | None = None,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_sequences: float | None = None,
        vocab_shards: VocabShards | None = None,
    ) -> KTOOutput:
        """hidden [S, T, H] with labels [S, T], or packed [N, H] and [N] with cu_seqlens [S + 1]; labels already
        shifted. With a trainable head on a GPU the host waits once, for the lengths.

        Args:
            desirable: bool [S].
            kl: the reference point, one number: from the method `kl`, or your own; it gets no gradient.
            ref_logps: [S]; or ref_hidden, ref_weight, ref_bias as in `FusedLinearCPOLoss`.
            num_sequences: the divisor of the loss, for gradient accumulation or several processes the number of
                sequences of the whole step; None divides by S.
        """
        reference = ReferenceModel(ref_hidden, ref_weight, ref_bias, ref_logps)
        given = self._sequences(PolicyHead(hidden, weight, labels, bias, vocab_shards), reference, cu_seqlens)
        check_types("a tensor", desirable=desirable)
        check_types("a number", optional=True, num_sequences=num_sequences)
        if num_sequences is not None and not (num_sequences > 0 and math.isfinite(num_sequences)):
            raise ValueError(f"num_sequences must be positive, got {num_sequences}: leave it out to divide by S")
        if desirable.shape != given.lengths.shape:
            raise ValueError(f"desirable must have shape {list(given.lengths.shape)}, got {list(desirable.shape)}")
        point = self._reference_point(kl)
        check_kto(desirable, point)
        if isinstance(point, Tensor):
            point = in_float64("kl", point, (), given.lengths.device)
        else:
            point = given.ref_logps.new_full((), float(point))
        weights = self.beta, self.desirable_weight, self.undesirable_weight
        args = KTOArgs(given.ref_logps, desirable.to(given.lengths.device), point, *weights)
        fused = given.inputs.needs.head and not given.inputs.keeps_live_sets
        run = self._from_hidden if fused else self._from_token_logps
        loss, losses, seq_logps, rewards, filter_sums = run(given, args, num_sequences)

        def mean(of: Tensor) -> Tensor:
            return torch.where(of, rewards, 0.0).sum() / of.sum()

        good, bad = mean(args.desirable), mean(~args.desirable)
        shares = filter_shares(given.inputs, filter_sums)
        return KTOOutput(loss, losses, seq_logps, rewards, good, bad, good - bad, point.to(loss.dtype), *shares)

    @torch.no_grad()
    def kl(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        vocab_shards: VocabShards | None = None,
    ) -> Tensor:
        """KTO's reference point: max(0, mean(L - ref)) over prompts with the response of another, in 1 product.

        The arguments are those of the call, for the mismatched batch. group: the mean over the sequences of all its
        processes, each of which must call; `torch.distributed.group.WORLD` for all, None for this process only.
        """
        self._has_reference_point("kl()")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__} {group!r:.60}")
        reference = ReferenceModel(ref_hidden, ref_weight, ref_bias, ref_logps)
        given = self._sequences(PolicyHead(hidden, weight, labels, bias, vocab_shards), reference, cu_seqlens)
        seq_logps, ref, _ = self._logps(given)
        if group is None:
            return kto_kl(seq_logps.double(), ref).to(seq_logps.dtype)
        sums = torch.stack([(seq_logps - ref).sum(), ref.new_tensor(len(ref))])
        dist.all_reduce(sums, group=group)
        return (sums[0] / sums[1].clamp(min=1)).clamp(min=0).to(seq_logps.dtype)

    def _reference_point(self, kl: Tensor | float | None) -> Tensor | float:
        if kl is None and not LOSS_TYPES[self.loss_type].has_kl:
            return 0.0
        self._has_reference_point("kl")
        if kl is None:
            raise ValueError(
                f"loss_type {self.loss_type!r} needs kl, its reference point: see the method kl(), or give kl=0.0"
            )
        check_types("a number or tensor", kl=kl)
        if (not isinstance(kl, Tensor) or (kl.numel() == 1 and checks.may_read(kl))) and not math.isfinite(kl):
            raise ValueError(f"kl must be finite, got {float(kl)}")
        return kl

    def _has_reference_point(self, what: str) -> None:
        if not LOSS_TYPES[self.loss_type].has_kl:
            raise ValueError(f"loss_type {self.loss_type!r} has no reference point: remove {what}")

    def _sequences(self, policy: PolicyHead, reference: ReferenceModel, cu_seqlens: Tensor | None) -> _Sequences:
        """All inputs but KTO's own, checked."""
        hidden, weight, labels, bias, shards = policy
        inputs = head_inputs(hidden, weight, labels, bias, self.head, shards)
        tensors = {f"ref_{name}": tensor for name, tensor in reference._asdict().items()}
        check_types("a tensor", optional=True, **tensors, cu_seqlens=cu_seqlens)
        dispatch.resolve_impl(self.impl, hidden.device)
        offsets = sequence_offsets(hidden, labels, cu_seqlens)
        lengths = label_counts(inputs.tensors.labels, offsets, inputs.options.ignore_index)
        ref_rows, ref_token_logps = reference_rows(inputs, policy, reference, self.head, self.impl)
        given = _Sequences(inputs, offsets, lengths, ref_rows, lengths.new_zeros(lengths.shape, dtype=torch.float64))
        if ref_token_logps is not None:
            return given._replace(ref_logps=self._sums(given, ref_token_logps).double())
        if reference.logps is not None:
            shape = tuple(lengths.shape)
            return given._replace(ref_logps=in_float64("ref_logps", reference.logps, shape, lengths.device))
        if ref_rows is None:
            raise ValueError("give ref_logps or ref_hidden; ref_logps=torch.zeros(S) for no reference model")
        return given

    def _sums(self, given: _Sequences, logps: Tensor) -> Tensor:
        """[S] of token log-probs [M]."""
        sums: Tensor = SequenceLogps.apply(logps, given.offsets, logps.new_empty(0), False, self.impl)
        return sums / given.lengths.clamp(min=1) if self.average_log_prob else sums

    def _logps(self, given: _Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """seq_logps [S], differentiable, ref_logps [S] in float64, and filter_sums [3]."""
        logp, _, ref_logp, filter_sums = token_logps_of(given.inputs, False, self.impl, None, given.ref_rows)
        ref_logps = given.ref_logps if given.ref_rows is None else self._sums(given, ref_logp).double()
        return self._sums(given, logp), ref_logps, filter_sums

    def _from_hidden(
        self, given: _Sequences, args: KTOArgs, num_sequences: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        inputs, ref = given.inputs, given.ref_rows
        ref = inputs.tensors.hidden.new_empty(0) if ref is None else ref
        count = -1.0 if num_sequences is None else float(num_sequences)
        last = inputs.options, inputs.needs, inputs.execution(self.impl)
        return linear_kto(inputs.tensors, LinearKTOArgs(args, given.lengths, ref, self.average_log_prob, count, *last))

    def _from_token_logps(
        self, given: _Sequences, args: KTOArgs, num_sequences: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Frozen and doubly filtered heads keep the gradient of each log-prob, so any loss can follow."""
        seq_logps, ref_logps, filter_sums = self._logps(given)
        args = args._replace(ref_logps=ref_logps)
        losses = args.losses(seq_logps)
        count = max(losses.shape[0], 1) if num_sequences is None else num_sequences
        acc = acc_dtype(given.inputs.tensors.hidden.dtype)
        loss = (losses.sum() / count).to(acc)
        rewards = args.rewards(seq_logps.detach()).to(acc)
        return loss, losses.detach().to(acc), seq_logps.detach(), rewards, filter_sums
