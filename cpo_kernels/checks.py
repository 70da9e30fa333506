"""Checks of the public functions' arguments, and when a check may read tensor values."""

import numbers
import os
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS: dict[str, Any] = {
    "a tensor": Tensor,
    "a number": numbers.Real,
    "a number or tensor": (numbers.Real, Tensor),
    "an integer": numbers.Integral,
}


def check_types(kind: str, optional: bool = False, **values: Any) -> None:
    """Raise TypeError for a value that is not `kind` (None passes if `optional`), and for a sparse tensor."""
    for name, value in values.items():
        if optional and value is None:
            continue
        if not isinstance(value, KINDS[kind]) or isinstance(value, bool):
            hint = f": use torch.tensor({name})" if kind == "a tensor" and isinstance(value, (list, tuple)) else ""
            raise TypeError(f"{name} must be {kind}, got {type(value).__name__} {value!r:.60}{hint}")
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {value.layout}: use {name}.to_dense()")


def check_list(name: str, values: Any, kind: Any, of: str) -> None:
    """Raise TypeError if `values` is not a list or tuple of `kind`, which the message calls `of`."""
    if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
        raise TypeError(f"{name} must be a list of {of}, got {values!r:.80}")


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_labels(labels: Tensor, shape: Sequence[int], like: str, device: torch.device) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}: use labels.long()")
    if tuple(labels.shape) != tuple(shape):
        hint = ""
        if labels.dim() == len(shape) > 0 and tuple(labels.shape[:-1]) == tuple(shape[:-1]):
            if abs(labels.shape[-1] - shape[-1]) == 1:
                cut = ":, " * (labels.dim() - 1)
                hint = f": position t predicts label t + 1, so give {like}[{cut}:-1] and labels[{cut}1:]"
        raise ValueError(f"labels must have shape {tuple(shape)} to match {like}, got {tuple(labels.shape)}{hint}")
    if labels.device != device:
        raise ValueError(f"labels are on {labels.device} and {like} on {device}: move one of them")


def check_head_order(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raise ValueError if the three fit a head in another order, such as Liger's (weight, hidden, labels)."""
    given = {"hidden": hidden, "weight": weight, "labels": labels}

    def fits(hidden: Tensor, weight: Tensor, labels: Tensor) -> bool:
        floats = hidden.is_floating_point() and weight.is_floating_point() and not labels.is_floating_point()
        same = weight.dim() == 2 and hidden.dim() > 0 and hidden.shape[-1] == weight.shape[1]
        return floats and same and labels.shape == hidden.shape[:-1]

    if fits(**given):
        return
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
    for order in permutations(given):
        if fits(*(given[name] for name in order)):
            meant = {name: role for role, name in zip(given, order, strict=True)}
            roles = ", ".join(meant[name] for name in given)
            raise ValueError(f"the order is (hidden, weight, labels); got {shapes}, which fit ({roles})")
    if weight.dim() == 2 and hidden.dim() > 0 and hidden.shape[-1] == weight.shape[0] != weight.shape[1]:
        raise ValueError(
            f"weight must have shape [V, H] with H = {hidden.shape[-1]}, the width of hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}, which is [H, V]: use weight.t()"
        )


def check_label_range(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raise ValueError for a label out of range. On a GPU this costs a host-device synchronisation."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"label {int(labels[tuple(position)])} is out of range at {position}: it must be in [0, {vocab_size}) or "
            f"equal ignore_index = {ignore_index}"
        )


def may_read(tensor: Tensor) -> bool:
    """Whether a check may read tensor values. Always on the CPU. On a GPU reading forces a host-device synchronisation,
    so only under CPO_KERNELS_CHECK=1. Never while torch traces, transforms or captures."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY):
        return False  # vmap and make_fx cannot read tensor values
    if tensor.device.type == "cpu":
        return True
    return checks_enabled() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def checks_enabled() -> bool:
    """CPO_KERNELS_CHECK=1 turns on the checks that force a host-device synchronisation on a GPU."""
    return os.environ.get("CPO_KERNELS_CHECK", "0") == "1"
