"""Which token sees which, in the form that the model's attention takes it.

sdpa, eager        a dense mask over rows of about 256 tokens
flex_attention     a block mask over one row; blocks without a visible pair cost nothing (backward on GPUs only)
flash_attention_2  lengths of the sequences in one row (varlen); packed and padded rows only
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.data.packing import ROW_TOKENS, Batch

MASKED = ("sdpa", "eager", "flex_attention")
TAKES = {"shared": MASKED, "packed": (*MASKED, "flash_attention_2")}


def set_attention(model: Any, name: str | None) -> None:
    """`model.attention` of the config; None keeps the model's."""
    if name is None:
        return
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "model.attention: flash_attention_2 needs flash-attn, which is not installed: take sdpa, or install it"
        )
    model.set_attn_implementation(name)


def row_tokens(model: Any) -> int | None:
    """What `collate` takes: the length of a row; None for one row of everything."""
    return ROW_TOKENS if _name(model) in ("sdpa", "eager") else None


def check_rows(model: Any, rows: str, max_tokens: int) -> None:
    """Rows of several prompts need attention that can keep them apart, and nothing else that carries state along."""
    if rows == "padded":
        return
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if (
        _name(model) not in TAKES[rows]
        or not kinds <= {"full_attention", "sliding_attention"}
        or (window or max_tokens) < max_tokens
    ):
        raise ValueError(
            f"training.rows: {rows} needs {' or '.join(TAKES[rows])} attention (model.attention) with a window of at "
            f"least data.max_tokens {max_tokens}; this model has {_name(model)!r}, layers {sorted(kinds)}, window "
            f"{window}: set training.rows: padded"
        )


def attention_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Arguments of the backbone beside tokens and positions."""
    if batch.tree is None or batch.branch is None:
        return {"attention_mask": None}  # causal; padding comes last and nothing looks at it
    name = _name(model)
    if name == "flash_attention_2":
        starts = torch.tensor([0, *batch.lengths], device=batch.tree.device).cumsum(0, dtype=torch.int32)
        longest = max(batch.lengths)
        starts_of = {f"cu_seq_lens_{side}": starts for side in "qk"}
        return {"attention_mask": None, **starts_of, "max_length_q": longest, "max_length_k": longest}
    if name == "flex_attention":
        return {"attention_mask": block_mask(batch.tree, batch.branch)}
    mask = dense_mask(batch.tree, batch.branch)
    if name == "eager":  # adds its mask
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return {"attention_mask": mask}


def dense_mask(tree: Tensor, branch: Tensor) -> Tensor:
    """[B, 1, T, T]: a token sees its own prompt and its own response up to itself; padding sees padding."""
    T = tree.shape[1]
    same_tree = tree[:, :, None] == tree[:, None, :]
    same_branch = branch[:, :, None] == branch[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=tree.device).tril()
    return (causal & same_tree & (same_branch | (branch == 0)[:, None, :]))[:, None]


def block_mask(tree: Tensor, branch: Tensor) -> Any:
    """The same as `dense_mask`, by blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (branch[b, q] == branch[b, k]) | (branch[b, k] == 0)
        return (q >= k) & (tree[b, q] == tree[b, k]) & own

    B, T = tree.shape
    return create_block_mask(sees, B, None, T, T, device=tree.device)


def _name(model: Any) -> str | None:
    return getattr(model.config.get_text_config(), "_attn_implementation", None)
