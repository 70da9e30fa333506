"""The op table: schemas, fakes, homes and the autograd boundary over logits.

A *home* is a place where the five kernels live: `reference` (plain PyTorch, any device), `cpu` (C++ extension),
`triton` and `cuda`. Every home offers the same five functions:

    token_logps_fwd     logits [N, V], labels [N] -> logp [N], lse [N], extra [4, N]
    token_logps_bwd_    logits overwritten with grad_t * (onehot - softmax) * dz/dlogit
    token_logps_fused_  both at once, with grad = 1
    sequence_sum        token log-probs [N], cu_seqlens [S+1] -> [S]
    preference          sequence log-probs [S], pairs [P, 2], ratings -> loss, gradient, metrics

The in-place kernels cannot carry autograd, so what torch.compile and autograd see are the functional ops below, which
choose a home when they run. This module imports no Triton.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels import reference
from cpo_kernels.checks import check_types

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LOGIT_ARGS = "int ignore_index, float scale, float softcap, int vocab_size"
SCHEMAS = {
    "token_logps_fwd": f"(Tensor logits, Tensor labels, {_LOGIT_ARGS}, bool extras) -> (Tensor, Tensor, Tensor)",
    "token_logps_bwd_": f"(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor grad, {_LOGIT_ARGS}) -> ()",
    "token_logps_fused_": (
        f"(Tensor(a!) logits, Tensor labels, {_LOGIT_ARGS}, bool extras) -> (Tensor, Tensor, Tensor)"
    ),
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


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_token_logps(logits: Tensor, extras: bool) -> tuple[Tensor, Tensor, Tensor]:
    acc, rows = acc_dtype(logits.dtype), logits.shape[0]
    extra = logits.new_empty((4, rows) if extras else (0,), dtype=acc)
    return logits.new_empty(rows, dtype=acc), logits.new_empty(rows, dtype=acc), extra


def _fake_preference(seq_logps: Tensor, pairs: Tensor) -> tuple[Tensor, ...]:
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
    return _fake_token_logps(logits, extras)


@torch.library.register_fake("cpo_kernels::token_logps_bwd_")
def _(logits, labels, lse, grad, ignore_index, scale, softcap, vocab_size):
    return None


@torch.library.register_fake("cpo_kernels::token_logps_fused_")
def _(logits, labels, ignore_index, scale, softcap, vocab_size, extras):
    return _fake_token_logps(logits, extras)


@torch.library.register_fake("cpo_kernels::sequence_sum")
def _(token_logps, cu_seqlens, token_weights, average):
    return token_logps.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.register_fake("cpo_kernels::preference")
def _(seq_logps, ref_logps, lengths, pairs, *args):
    return _fake_preference(seq_logps, pairs)


# ---------------------------------------------------------------------------------------------------------- homes


def _load_extension(name: str) -> str:
    """Import a compiled extension; '' when it is there, else why it is not."""
    try:
        importlib.import_module(f"cpo_kernels.{name}")
    except ImportError as error:
        return str(error)
    return ""


def _why_missing() -> dict[str, str]:
    """Why a home cannot be used here; '' when it can. Triton is not imported yet; _C_cuda loads on first use."""
    no_triton = "the triton package is not installed: pip install 'cpo-kernels[triton]'"
    no_cuda = "this installation has no CUDA C++ extension: build it where torch has CUDA and nvcc is found"
    return {
        "reference": "",
        "cpu": _load_extension("_C"),
        "triton": "" if importlib.util.find_spec("triton") else no_triton,
        "cuda": "" if importlib.util.find_spec("cpo_kernels._C_cuda") else no_cuda,
    }


_MISSING = _why_missing()
if _MISSING["cpu"]:
    warnings.warn(
        f"cpo_kernels runs on its slow PyTorch reference: the C++ extension could not be loaded ({_MISSING['cpu']}). "
        "Reinstall with a C++ compiler at hand: pip install --no-build-isolation --force-reinstall cpo-kernels",
        RuntimeWarning,
        stacklevel=2,
    )
if (torch.version.cuda or torch.version.hip) and _MISSING["triton"] and _MISSING["cuda"]:
    warnings.warn(
        f"cpo_kernels runs on its slow PyTorch reference on a GPU: {_MISSING['triton']}", RuntimeWarning, stacklevel=2
    )


def missing(impl: str) -> str:
    """Why a home cannot be used here; '' when it can."""
    return _MISSING[impl]


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors; Triton reads it when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_impl(impl: str) -> None:
    """Raises where `impl` is no home, or one that is not there: a home asked for by name never falls back."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl != "auto" and missing(impl):
        raise RuntimeError(f"impl={impl!r} is not available: {missing(impl)}. Use impl='auto'")


def _auto_impl(device: torch.device) -> str:
    if device.type == "cpu":
        return "reference" if missing("cpu") else "cpu"
    for home in ("triton", "cuda"):
        if device.type == "cuda" and not missing(home):
            return home
    return "reference"


def resolve_impl(impl: str, device: torch.device) -> str:
    """The home that `impl` names for tensors on `device`.

    auto: `cpu` for CPU tensors, `triton` (or `cuda`, where there is no Triton) for GPU tensors, else `reference`.
    """
    check_impl(impl)
    if impl == "auto":
        return _auto_impl(device)
    wanted = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(impl, device.type)
    if device.type != wanted and not (impl == "triton" and device.type == "cpu" and triton_interpreted()):
        kind = "CPU tensors" if wanted == "cpu" else "GPU tensors (CPU tensors under TRITON_INTERPRET=1 alone)"
        kind = "GPU tensors" if impl == "cuda" else kind
        raise ValueError(f"impl={impl!r} takes {kind}, got a tensor on {device}. Use impl='auto'")
    return impl


def kernels(impl: str, tensor: Tensor) -> Any:
    """The namespace that holds the five kernels of a home, `impl@shards` for a vocabulary spread over ranks."""
    if "@" in impl:
        return importlib.import_module("cpo_kernels.sharded").sharded_kernels(impl, tensor)
    home = resolve_impl(impl, tensor.device)
    if home == "triton":
        return importlib.import_module("cpo_kernels.kernels")
    if home == "cuda" and (reason := _load_extension("_C_cuda")):
        raise RuntimeError(f"impl='cuda': the CUDA extension could not be loaded: {reason}")
    return reference if home == "reference" else torch.ops.cpo_kernels


def checks_enabled() -> bool:
    """CPO_KERNELS_CHECK=1 turns on the checks that would cost a device-to-host copy on a GPU."""
    return os.environ.get("CPO_KERNELS_CHECK", "0") == "1"


# -------------------------------------------------------------------------------------------------- functional ops


BODIES: dict[Any, Callable[..., Any]] = {}  # of the functional ops, for tests that watch them at work


def functional_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """An opaque op without mutation, run with autocast off: its products take the dtypes they are given.

    torch.library.custom_op would do the same and import torch._dynamo at the first call: 2.0 s against 0.1 s to the
    first loss of a process (2 cores, torch 2.13).
    """

    def wrap(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0]
            with torch.autocast(tensor.device.type, enabled=False):
                return function(*args, **kwargs)

        _library.define(name + torch.library.infer_schema(run, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
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


@functional_op("token_logps")
def token_logps_op(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    extras: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(impl, logits).token_logps_fwd(logits, labels, ignore_index, scale, softcap, vocab_size, extras)


@torch.library.register_fake("cpo_kernels::token_logps")
def _(logits, labels, ignore_index, scale, softcap, vocab_size, extras, impl):
    return _fake_token_logps(logits, extras)


@functional_op("token_logps_backward")
def token_logps_backward_op(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    vocab_size: int,
    impl: str,
) -> Tensor:
    dlogits = logits.clone(memory_format=torch.contiguous_format)
    kernels(impl, logits).token_logps_bwd_(
        dlogits, labels, lse, grad.contiguous(), ignore_index, scale, softcap, vocab_size
    )
    return dlogits


@torch.library.register_fake("cpo_kernels::token_logps_backward")
def _(logits, labels, lse, grad, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@functional_op("sequence_logps")
def sequence_logps_op(
    token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor, average: bool, impl: str
) -> Tensor:
    return kernels(impl, token_logps).sequence_sum(token_logps, cu_seqlens, token_weights, average)


@torch.library.register_fake("cpo_kernels::sequence_logps")
def _(token_logps, cu_seqlens, token_weights, average, impl):
    return token_logps.new_empty(cu_seqlens.shape[0] - 1)


@functional_op("preference_loss")
def preference_op(
    seq_logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    scores: Tensor,
    conditions: Tensor,
    objectives: Tensor,
    pair_weights: Tensor,
    pair_betas: Tensor,
    margins: Tensor,
    loss_types: Sequence[int],
    loss_weights: Sequence[float],
    options: Sequence[float],
    num_pairs: float,
    chosen_tokens: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = (seq_logps, ref_logps, lengths, pairs, scores, conditions, objectives, pair_weights, pair_betas)
    return kernels(impl, seq_logps).preference(
        *args, margins, loss_types, loss_weights, options, num_pairs, chosen_tokens
    )


@torch.library.register_fake("cpo_kernels::preference_loss")
def _(seq_logps, ref_logps, lengths, pairs, *args):
    return _fake_preference(seq_logps, pairs)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, head, extras, impl):
        logp, lse, extra = token_logps_op(logits, labels, *head, extras, impl)
        ctx.save_for_backward(logits, labels, lse)
        ctx.head, ctx.impl = head, impl
        ctx.mark_non_differentiable(extra)
        return logp, extra

    @staticmethod
    def backward(ctx, grad, _):
        refuse_double_backward()
        logits, labels, lse = ctx.saved_tensors
        dlogits = token_logps_backward_op(logits, labels, lse, grad, *ctx.head, ctx.impl)
        return dlogits, None, None, None, None


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps, cu_seqlens, token_weights, average, impl):
        ctx.save_for_backward(cu_seqlens, token_weights)
        ctx.average, ctx.num_tokens = average, token_logps.shape[0]
        return sequence_logps_op(token_logps, cu_seqlens, token_weights, average, impl)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        cu_seqlens, token_weights = ctx.saved_tensors
        counts = cu_seqlens.diff()
        if ctx.average:
            grad = grad / counts.clamp(min=1)
        grad = grad.repeat_interleave(counts, output_size=ctx.num_tokens)
        return (grad * token_weights if token_weights.numel() else grad), None, None, None, None


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seq_logps, args, impl):
        loss, losses, grad, *metrics = preference_op(seq_logps, *args, impl)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses, *metrics)
        return loss, losses, *metrics

    @staticmethod
    def backward(ctx, grad_loss, *_):
        refuse_double_backward()
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None


# ---------------------------------------------------------------------------------------------------- public door


class HeadOptions(NamedTuple):
    """What turns a product into logits: z = softcap * tanh(scale * u / softcap), columns >= vocab_size are -inf."""

    ignore_index: int
    scale: float
    softcap: float  # 0.0: off
    vocab_size: int


class TokenExtras(NamedTuple):
    """Per-token statistics of the distribution, shaped like the labels, not differentiable; 0 at ignored positions."""

    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    is_top1: Tensor


def head_options(
    width: int, ignore_index: int, softcap: float | None, scale: float, vocab_size: int | None
) -> HeadOptions:
    check_types("a number", scale=scale)
    check_types("a number", optional=True, softcap=softcap)
    check_types("an integer", ignore_index=ignore_index)
    check_types("an integer", optional=True, vocab_size=vocab_size)
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a positive number, or None for no cap, got {softcap}")
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if vocab_size is not None and not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must lie in [1, {width}], the number of logit columns, got {vocab_size}")
    return HeadOptions(int(ignore_index), float(scale), softcap or 0.0, width if vocab_size is None else vocab_size)


def check_labels(labels: Tensor, shape: Sequence[int], like: str, device: torch.device) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}: use labels.long()")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"labels must have shape {tuple(shape)} to match {like}, got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"labels are on {labels.device} and {like} on {device}: move one of them")


def check_label_range(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Costs a device-to-host copy on a GPU."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"label {int(labels[row])} is out of range at row {row}: it must be in [0, {vocab_size}) or equal "
            f"ignore_index = {ignore_index}"
        )


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def token_extras(extra: Tensor, shape: Sequence[int]) -> TokenExtras:
    entropy, log_sum_sq_probs, mean_logit, is_top1 = (row.view(shape) for row in extra)
    return TokenExtras(entropy, log_sum_sq_probs, mean_logit, is_top1 > 0.5)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
    extras: bool = False,
    impl: str = "auto",
) -> Any:
    """Log-prob of each label: logp_t = z_{t,y_t} - logsumexp_v z_{t,v}, z = softcap * tanh(scale * logits / softcap).

    Args:
        logits: [..., V] in float32, bfloat16, float16 or float64.
        labels: [...] int64; positions equal to `ignore_index` give exactly 0 and no gradient.
        softcap: cap c of the logits (Gemma 2), None for none.
        scale: factor on the logits (Cohere, Granite) before the cap.
        vocab_size: columns from here on are padding and count as -inf.
        extras: also return `TokenExtras` (entropy, log sum p^2, mean logit, is_top1).
        impl: the home, see `cpo_kernels.ops`; a home asked for by name never falls back.

    Returns:
        [...] float32 (float64 for float64 logits), or a pair of it and `TokenExtras`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, option, or (on the CPU) a label outside [0, vocab_size).

    Example:
        >>> token_logps(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor([-1.3863,  0.0000])
    """
    refuse_transforms()
    check_types("a tensor", logits=logits, labels=labels)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    check_dtype("logits", logits)
    shape = logits.shape[:-1]
    check_labels(labels, shape, "logits", logits.device)
    head = head_options(logits.shape[-1], ignore_index, softcap, scale, vocab_size)
    resolve_impl(impl, logits.device)
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    logp, extra = _TokenLogps.apply(rows, labels.reshape(-1), head, extras, impl)
    return (logp.view(shape), token_extras(extra, shape)) if extras else logp.view(shape)


def sequence_logps(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None = None,
    average: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Sequence log-prob L_s = sum_{t in s} m_t logp_t, summed in float64 and stored in the input's dtype.

    Args:
        token_logps: [N] float32 or float64, sequences end to end.
        cu_seqlens: [S + 1] int64 offsets: sequence s holds tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1.
        token_weights: [N] weights m_t, 1 if None.
        average: divide by the number of tokens of the sequence; an empty sequence gives 0.

    Returns:
        [S] in the dtype of `token_logps`.
    """
    refuse_transforms()
    check_types("a tensor", token_logps=token_logps)
    check_types("a tensor", optional=True, token_weights=token_weights)
    if token_logps.dim() != 1 or token_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"token_logps must be float32 or float64 of shape [N], got {token_logps.dtype} {tuple(token_logps.shape)}"
        )
    check_cu_seqlens(cu_seqlens, token_logps.shape[0])
    if token_weights is None:
        token_weights = token_logps.new_empty(0)
    elif token_weights.shape != token_logps.shape:
        raise ValueError(f"token_weights must have shape {tuple(token_logps.shape)}, got {tuple(token_weights.shape)}")
    weights = token_weights.to(token_logps.dtype)
    return _SequenceLogps.apply(token_logps, cu_seqlens, weights, average, impl)


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    check_types("a tensor", cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int64 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be int64 of shape [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if torch.compiler.is_compiling() or (cu_seqlens.device.type != "cpu" and not checks_enabled()):
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}, got {cu_seqlens.tolist()}"
        )


def preference(seq_logps: Tensor, args: tuple[Any, ...], impl: str) -> tuple[Tensor, ...]:
    """Differentiable `preference`: (loss, losses, chosen_rewards, rejected_rewards, value_gap, order, counts)."""
    return _Preference.apply(seq_logps, args, impl)
