"""The op table: the schemas of the kernels, and how functional ops are defined.

    token_logps_fwd     logits [N, V], labels [N] -> logp [N], lse [N], extra [4, N]
    token_logps_bwd_    logits overwritten with grad_t * (onehot - softmax) * dz/dlogit
    token_logps_fused_  both at once, with grad = 1
    live_columns, live_grads, live_sum   gradients on the live columns, see `reference.live_columns`
    sequence_sum        token log-probs [N], cu_seqlens [S+1] -> [S]
    preference          sequence log-probs [S], pairs [P, 2], ratings -> loss, gradient, metrics

A constant may have been subtracted from each row of logits, and the labels' logits may be known more exactly than they
are stored: `anchors` [2, N], see `reference.token_logps_fwd`. Every backend implements all of these. The in-place
kernels cannot carry autograd: torch.compile and autograd see functional ops, which choose a backend when they run (in
`ops` and `head`).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import islice
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_LOGIT_ARGS = "int ignore_index, float scale, float softcap, int vocab_size"
_ANCHORS = "Tensor? anchors=None"
SCHEMAS = {
    "token_logps_fwd": (
        f"(Tensor logits, Tensor labels, {_LOGIT_ARGS}, bool extras, {_ANCHORS}) -> (Tensor, Tensor, Tensor)"
    ),
    "token_logps_bwd_": (
        f"(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor grad, {_LOGIT_ARGS}, {_ANCHORS},"
        " Tensor? entropies=None) -> ()"
    ),
    "token_logps_fused_": (
        f"(Tensor(a!) logits, Tensor labels, {_LOGIT_ARGS}, bool extras, {_ANCHORS}) -> (Tensor, Tensor, Tensor)"
    ),
    "live_columns": (
        f"(Tensor logits, Tensor labels, Tensor lse, float eps, int set_rows, {_LOGIT_ARGS}, {_ANCHORS})"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "live_grads": (
        "(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets, int set_rows,"
        f" {_LOGIT_ARGS}, {_ANCHORS}) -> Tensor"
    ),
    "live_sum": "(Tensor tail, Tensor tails, Tensor made, Tensor columns, Tensor offsets) -> Tensor",
    "sequence_sum": "(Tensor token_logps, Tensor cu_seqlens, Tensor token_weights, bool average) -> Tensor",
    "preference": (
        "(Tensor seq_logps, Tensor ref_logps, Tensor lengths, Tensor pairs, Tensor scores, Tensor conditions,"
        " Tensor objectives, Tensor pair_weights, Tensor pair_betas, Tensor margins, int[] loss_types,"
        " float[] loss_weights, float[] options, float num_pairs, float chosen_tokens)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

# What only the CPU kernels have: what `head.live` makes of live_columns, live_grads into memory that is there, and
# matmuls, see `dispatch.own_matmuls`: logits, and those with live columns, for which Triton has its own kernels.
CPU_SCHEMAS = {
    "list_live_columns": (
        f"(Tensor logits, Tensor labels, Tensor lse, float eps, int set_rows, {_LOGIT_ARGS}, int most,"
        f" float tail_unit, {_ANCHORS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "live_grads_": SCHEMAS["live_grads"].replace("=None) -> Tensor", ", Tensor(a!) out) -> ()"),
    "logits_": "(Tensor x, Tensor weight, Tensor bias, Tensor lacks, Tensor(a!) out) -> ()",
    "relative_anchors": (
        "(Tensor x, Tensor weight, Tensor labels, Tensor few, float scale, float softcap, Tensor(a!) room) -> Tensor"
    ),
    "linear_token_logps_fwd": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor labels, int ignore_index, float scale, int vocab_size,"
        " Tensor anchors) -> (Tensor, Tensor)"
    ),
    "add_product_": (
        "(Tensor(a!) total, Tensor(b!) low, Tensor a, Tensor b, bool first, bool last, float factor) -> ()"
    ),
    "live_sums_": (
        "(Tensor g, Tensor columns, Tensor offsets, int set_rows, Tensor weight, Tensor label_columns,"
        " Tensor label_grads, Tensor(a!) out) -> ()"
    ),
    "live_sums_of_logits_": (
        "(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets, int set_rows,"
        f" {_LOGIT_ARGS}, Tensor? anchors, Tensor weight, Tensor label_columns, Tensor label_grads, Tensor means,"
        " Tensor coef, Tensor(a!) room, Tensor(b!) out, Tensor(c!) tau) -> ()"
    ),
    "live_dw": (
        "(Tensor g, Tensor columns, Tensor offsets, int set_rows, Tensor x, Tensor coef, Tensor tail, Tensor tails,"
        " Tensor label_columns, Tensor label_grads, int rows) -> Tensor"
    ),
}

_library = torch.library.Library("cpo_kernels", "DEF")
for _name, _schema in {**SCHEMAS, **CPU_SCHEMAS}.items():
    _library.define(_name + _schema)


class TokenLogps(NamedTuple):
    """What `token_logps_fwd` and `token_logps_fused_` return."""

    logp: Tensor  # [N]
    lse: Tensor  # [N]
    extra: Tensor  # [4, N] or [0]


class PreferenceResult(NamedTuple):
    """What `preference` returns. See `reference.preference`."""

    loss: Tensor  # []
    losses: Tensor  # [P]
    grad: Tensor  # [S], d loss / d seq_logps
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P]
    value_gap: Tensor  # [P]
    order: Tensor  # [P] int8
    counts: Tensor  # [3] int64


class Kernels(Protocol):
    """The kernels of a backend (a module or a namespace); their results are plain tuples."""

    def token_logps_fwd(
        self, logits: Tensor, labels: Tensor, ignore_index: int, scale: float, softcap: float, vocab_size: int,
        extras: bool, anchors: Tensor | None = None, /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def token_logps_bwd_(
        self, logits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, ignore_index: int, scale: float,
        softcap: float, vocab_size: int, anchors: Tensor | None = None, entropies: Tensor | None = None, /,
    ) -> None: ...  # fmt: skip

    def token_logps_fused_(
        self, logits: Tensor, labels: Tensor, ignore_index: int, scale: float, softcap: float, vocab_size: int,
        extras: bool, anchors: Tensor | None = None, /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def live_columns(
        self, logits: Tensor, labels: Tensor, lse: Tensor, eps: float, set_rows: int, ignore_index: int, scale: float,
        softcap: float, vocab_size: int, anchors: Tensor | None = None, /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def live_grads(
        self, logits: Tensor, labels: Tensor, lse: Tensor, row_sums: Tensor, columns: Tensor, offsets: Tensor,
        set_rows: int, ignore_index: int, scale: float, softcap: float, vocab_size: int,
        anchors: Tensor | None = None, /,
    ) -> Tensor: ...  # fmt: skip

    def live_sum(self, tail: Tensor, tails: Tensor, made: Tensor, columns: Tensor, offsets: Tensor, /) -> Tensor: ...

    def sequence_sum(
        self, token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor, average: bool, /
    ) -> Tensor: ...

    def preference(
        self, seq_logps: Tensor, ref_logps: Tensor, lengths: Tensor, pairs: Tensor, scores: Tensor, conditions: Tensor,
        objectives: Tensor, pair_weights: Tensor, pair_betas: Tensor, margins: Tensor, loss_types: list[int],
        loss_weights: list[float], options: list[float], num_pairs: float, chosen_tokens: float, /,
    ) -> tuple[Tensor, ...]: ...  # fmt: skip


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_token_logps(logits: Tensor, extras: bool) -> TokenLogps:
    acc, rows = acc_dtype(logits.dtype), logits.shape[0]
    extra = logits.new_empty((4, rows) if extras else (0,), dtype=acc)
    return TokenLogps(logits.new_empty(rows, dtype=acc), logits.new_empty(rows, dtype=acc), extra)


def fake_sequence_sum(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    return token_logps.new_empty(cu_seqlens.shape[0] - 1)


def fake_preference(seq_logps: Tensor, pairs: Tensor) -> PreferenceResult:
    num_pairs = pairs.shape[0]
    losses, chosen, rejected, gap = (seq_logps.new_empty(num_pairs) for _ in range(4))
    order, counts = pairs.new_empty(num_pairs, dtype=torch.int8), pairs.new_empty(3)
    loss, grad = seq_logps.new_empty(()), torch.empty_like(seq_logps)
    return PreferenceResult(loss, losses, grad, chosen, rejected, gap, order, counts)


_FAKES: dict[str, Callable[..., Any]] = {
    "token_logps_fwd": lambda logits, *args: fake_token_logps(logits, extras=args[5]),
    "token_logps_bwd_": lambda *args: None,
    "token_logps_fused_": lambda logits, *args: fake_token_logps(logits, extras=args[5]),
    "sequence_sum": lambda token_logps, cu_seqlens, *_: fake_sequence_sum(token_logps, cu_seqlens),
    "preference": lambda seq_logps, ref_logps, lengths, pairs, *_: fake_preference(seq_logps, pairs),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"cpo_kernels::{_name}", _fake)


# ----------------------------------------------------------------------------------------------------- functional ops


def flatten(values: Iterable[Any]) -> list[Any]:
    """The fields of NamedTuples, at any depth, in place of the NamedTuples."""
    leaves: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            leaves += flatten(value)
        else:
            leaves.append(value)
    return leaves


def _fields(name: str, kind: Any) -> list[tuple[str, Any]]:
    """Name and type of each leaf of a parameter."""
    if not hasattr(kind, "_fields"):
        return [(name, kind)]
    return [leaf for field, hint in get_type_hints(kind).items() for leaf in _fields(field, hint)]


def _builder(kind: Any) -> Callable[[Iterator[Any]], Any]:
    """A function that builds a value of this type from its leaves."""
    if not hasattr(kind, "_fields"):
        return next
    builders = [_builder(hint) for hint in get_type_hints(kind).values()]
    if all(build is next for build in builders):
        return lambda leaves: kind(*islice(leaves, len(builders)))
    return lambda leaves: kind(*[build(leaves) for build in builders])


class FunctionalOp(Generic[P, R]):
    """A registered op that is called with, and returns, the NamedTuples of its function."""

    def __init__(self, overload: Any, result: Any) -> None:
        self.overload = overload  # the registered op, of flat arguments and results
        self.build = _builder(result) if hasattr(result, "_fields") else None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        out = self.overload(*flatten(args), **kwargs)
        result: R = out if self.build is None else self.build(iter(out))
        return result


BODIES: dict[Any, Callable[..., Any]] = {}  # flat bodies of the registered ops, for tests that observe them


def functional_op(
    name: str, fake: Callable[..., R], waits: bool = False
) -> Callable[[Callable[P, R]], FunctionalOp[P, R]]:
    """Register an opaque op without mutation. It runs with autocast off: its matmuls use the dtypes of its arguments.

    A NamedTuple as parameter or result, nested ones included, stands for its fields: these are the arguments and
    results of the registered op. The function, `fake` and callers use the NamedTuples.
    fake: takes the function's arguments and returns a result of the right shapes and dtypes.
    waits: the op may force a host-device synchronisation, if no plan or index avoids it. torch.compile then keeps the
    op out of its CUDA graphs (mode="reduce-overhead"), whose capture would fail.

    torch.library.custom_op would do the same, but imports torch._dynamo at the first call: 2.0 s against 0.1 s to the
    first loss of a process (2 cores, torch 2.13).
    """

    def wrap(function: Callable[P, R]) -> FunctionalOp[P, R]:
        signature = inspect.signature(function, eval_str=True)
        result = signature.return_annotation
        builders = [_builder(p.annotation) for p in signature.parameters.values()]
        kinds = [leaf for p in signature.parameters.values() for leaf in _fields(p.name, p.annotation)]
        tensors = _fields("", result)

        def flat(body: Callable[..., Any], *args: Any) -> Any:
            leaves = iter(args)
            out = body(*[build(leaves) for build in builders])
            return tuple(flatten(out)) if isinstance(out, tuple) else out

        @wraps(function)
        def run(*args: Any) -> Any:
            device = args[0].device.type
            if not torch.is_autocast_enabled(device):
                return flat(function, *args)
            with torch.autocast(device, enabled=False):
                return flat(function, *args)

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for n, kind in kinds],
            return_annotation=tuple[tuple(kind for _, kind in tensors)] if len(tensors) > 1 else result,  # type: ignore[misc]
        )
        tags = [torch.Tag.pt2_compliant_tag, *[torch.Tag.cudagraph_unsafe] * waits]
        _library.define(name + torch.library.infer_schema(run, mutates_args=()), tags=tags)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cpo_kernels::{name}", lambda *args: flat(fake, *args))
        op = FunctionalOp[P, R](getattr(torch.ops.cpo_kernels, name).default, result)
        BODIES[op.overload] = run
        return op

    return wrap


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "cpo_kernels gives first derivatives only: call backward() or autograd.grad() without create_graph=True"
        )


def refuse_transforms() -> None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "cpo_kernels does not run under torch.func (grad, vmap, jvp, jacrev, ...): use backward() or "
            "torch.autograd.grad(), or the plain PyTorch of cpo_kernels.reference"
        )
