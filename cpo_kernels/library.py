"""The op table: the schemas of the five kernels, and how functional ops are defined.

    token_logps_fwd     logits [N, V], labels [N] -> logp [N], lse [N], extra [4, N]
    token_logps_bwd_    logits overwritten with grad_t * (onehot - softmax) * dz/dlogit
    token_logps_fused_  both at once, with grad = 1
    sequence_sum        token log-probs [N], cu_seqlens [S+1] -> [S]
    preference          sequence log-probs [S], pairs [P, 2], ratings -> loss, gradient, metrics

Every backend offers these. The in-place kernels cannot carry autograd: what torch.compile and autograd see are
functional ops, which choose a backend when they run (in `ops` and `head`).
"""

import inspect
from collections.abc import Callable
from functools import wraps
from itertools import islice
from typing import Any, get_type_hints

import torch
from torch import Tensor

_LOGIT_ARGS = "int ignore_index, float scale, float softcap, int vocab_size"
SCHEMAS = {
    "token_logps_fwd": f"(Tensor logits, Tensor labels, {_LOGIT_ARGS}, bool extras) -> (Tensor, Tensor, Tensor)",
    "token_logps_bwd_": f"(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor grad, {_LOGIT_ARGS}) -> ()",
    "token_logps_fused_": (
        f"(Tensor(a!) logits, Tensor labels, {_LOGIT_ARGS}, bool extras) -> (Tensor, Tensor, Tensor)"
    ),
    "live_columns": (
        f"(Tensor logits, Tensor labels, Tensor lse, float eps, int set_rows, {_LOGIT_ARGS})"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "live_grads": (
        "(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets, int set_rows,"
        f" {_LOGIT_ARGS}) -> Tensor"
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

_library = torch.library.Library("cpo_kernels", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
COMPILED = torch.ops.cpo_kernels  # where the extensions, once loaded, have their kernels


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_token_logps(logits: Tensor, extras: bool) -> tuple[Tensor, Tensor, Tensor]:
    acc, rows = acc_dtype(logits.dtype), logits.shape[0]
    extra = logits.new_empty((4, rows) if extras else (0,), dtype=acc)
    return logits.new_empty(rows, dtype=acc), logits.new_empty(rows, dtype=acc), extra


def fake_preference(seq_logps: Tensor, pairs: Tensor) -> tuple[Tensor, ...]:
    num_pairs = pairs.shape[0]
    per_pair = [seq_logps.new_empty(num_pairs) for _ in range(4)]  # losses, chosen, rejected rewards, value gap
    return (
        seq_logps.new_empty(()),
        per_pair[0],
        torch.empty_like(seq_logps),
        *per_pair[1:],
        pairs.new_empty(num_pairs, dtype=torch.int8),
        pairs.new_empty(3),
    )


@torch.library.register_fake("cpo_kernels::token_logps_fwd")
def _(logits, labels, ignore_index, scale, softcap, vocab_size, extras):
    return fake_token_logps(logits, extras)


@torch.library.register_fake("cpo_kernels::token_logps_bwd_")
def _(logits, labels, lse, grad, ignore_index, scale, softcap, vocab_size):
    return None


@torch.library.register_fake("cpo_kernels::token_logps_fused_")
def _(logits, labels, ignore_index, scale, softcap, vocab_size, extras):
    return fake_token_logps(logits, extras)


@torch.library.register_fake("cpo_kernels::sequence_sum")
def _(token_logps, cu_seqlens, token_weights, average):
    return token_logps.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.register_fake("cpo_kernels::preference")
def _(seq_logps, ref_logps, lengths, pairs, *args):
    return fake_preference(seq_logps, pairs)


BODIES: dict[Any, Callable[..., Any]] = {}  # of the functional ops, for tests that watch them at work


def functional_op(name: str, waits: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """An opaque op without mutation, run with autocast off: its products take the dtypes they are given.

    A parameter that is a NamedTuple stands for its fields, one argument each, in the schema and in calls of the op.
    waits: the host may wait for the device inside, where no plan or index spares it. torch.compile then leaves the op
    out of its CUDA graphs (mode="reduce-overhead"), whose capture would fail.

    torch.library.custom_op would do the same and import torch._dynamo at the first call: 2.0 s against 0.1 s to the
    first loss of a process (2 cores, torch 2.13).
    """

    def wrap(function: Callable[..., Any]) -> Any:
        parameters, groups = [], []
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            kind = parameter.annotation
            fields = get_type_hints(kind) if hasattr(kind, "_fields") else {parameter.name: kind}
            parameters += [parameter.replace(name=name, annotation=hint) for name, hint in fields.items()]
            groups.append((kind if hasattr(kind, "_fields") else None, len(fields)))

        @wraps(function)
        def run(*flat: Any) -> Any:
            values = iter(flat)
            args = [next(values) if kind is None else kind(*islice(values, n)) for kind, n in groups]
            with torch.autocast(flat[0].device.type, enabled=False):
                return function(*args)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        tags = [torch.Tag.pt2_compliant_tag, *[torch.Tag.cudagraph_unsafe] * waits]
        _library.define(name + torch.library.infer_schema(run, mutates_args=()), tags=tags)
        _library.impl(name, run, "CompositeExplicitAutograd")
        op = getattr(torch.ops.cpo_kernels, name).default
        BODIES[op] = run
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
