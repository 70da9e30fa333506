"""Which token attends to which, in the form that the model's attention expects.

sdpa, eager        a dense mask over rows of about 256 tokens
segments           one sdpa call for every prompt and response of a row: no work on masked positions
flex_attention     a block mask over one row; fully masked blocks cost nothing (backward only on GPUs)
flash_attention_2  lengths of the sequences in one row (varlen); packed and padded rows only

`segments` is faster on a CPU if a prompt with its responses fills a row (times in docs/training.md); for shorter ones
the extra calls cost more than the mask. It raises under torch.compile, which would recompile for every batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.data.packing import ROW_TOKENS, Batch
from cpo_kernels.extras import install_line
from cpo_kernels.recipe.keys import Config

MASKED = ("sdpa", "eager", "segments", "flex_attention")
BY_PLACE = ("gpt_neo", "mpt", "bloom")  # windows or alibi that ignore position_ids
TAKES = {"shared": MASKED, "packed": (*MASKED, "flash_attention_2")}


def set_attention(model: Any, name: str | None) -> None:
    """Set `model.attention` of the config; None keeps the model's."""
    if name is None:
        return
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "model.attention: flash_attention_2 needs flash-attn, which is not installed: use sdpa, or "
            + install_line("flash_attn")
        )
    if name == "segments":
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register(name, segment_attention)
        AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def row_tokens(model: Any) -> int | None:
    """The row length for `collate`; None for a single row."""
    return ROW_TOKENS if _name(model) in ("sdpa", "eager") else None


def check_rows(model: Any, config: Config) -> None:
    """Raise ValueError if the model cannot keep several sequences of a row apart: its attention must mask them, and no
    layer may carry state along the row."""
    rows, max_tokens, compiled = config.training.rows, config.data.max_tokens, config.training.compile
    if rows == "padded":
        return
    text = model.config.get_text_config()
    if text.model_type in BY_PLACE or getattr(text, "alibi", False):
        raise ValueError(
            f"training.rows: {rows} puts several sequences into a row, but the attention of {text.model_type} uses a "
            "token's index in its row instead of its position_ids: set training.rows: padded"
        )
    if _name(model) == "segments" and compiled:
        raise ValueError(
            "model.attention: segments would recompile for every batch: set training.compile: false or "
            "model.attention: sdpa"
        )
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
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
    """Arguments of the backbone besides tokens and positions."""
    if batch.tree is None or batch.branch is None:
        return {"attention_mask": None}  # causal; padding comes last and nothing attends to it
    name = _name(model)
    if name == "flash_attention_2":
        lengths = [sum(segments) for segments in batch.segments]
        starts = torch.tensor([0, *lengths], device=batch.tree.device).cumsum(0, dtype=torch.int32)
        longest = max(lengths)
        starts_of = {f"cu_seq_lens_{side}": starts for side in "qk"}
        return {"attention_mask": None, **starts_of, "max_length_q": longest, "max_length_k": longest}
    if name == "flex_attention":
        return {"attention_mask": block_mask(batch.tree, batch.branch)}
    if name == "segments":  # the model adds no mask of its own to a four-dimensional one
        return {"attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool), "segments": batch.segments}
    mask = dense_mask(batch.tree, batch.branch)
    if name == "eager":  # adds its mask
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return {"attention_mask": mask}


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Sequence[tuple[int, ...]] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa [1, heads, T, D] -> [1, T, heads, D], one segment of `Batch.segments` after another; over the
    whole row if there are none, as in generation."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if segments is None:
        if attention_mask is not None and not attention_mask.numel():
            raise ValueError(
                f"{type(module).__name__} gets no segments: its model does not pass arguments on to its layers. Set "
                "model.attention: sdpa"
            )
        return sdpa(module, query, key, value, attention_mask, **options)
    lengths = [n for tree in segments for n in tree]  # split, not slices: one backward for all of them
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    made = []
    for prompt, *responses in segments:
        q, prompt_key, prompt_value = next(parts)
        made.append(sdpa(module, q, prompt_key, prompt_value, None, **options)[0])
        for n, (q, k, v) in zip(responses, parts, strict=False):
            if n:
                sees = torch.ones(n, prompt + n, dtype=torch.bool, device=q.device).tril(prompt)
                keys, values = torch.cat([prompt_key, k], 2), torch.cat([prompt_value, v], 2)
                made.append(sdpa(module, q, keys, values, sees, **options)[0])
    return torch.cat(made, 1), None


def dense_mask(tree: Tensor, branch: Tensor) -> Tensor:
    """[B, 1, T, T]: a token attends to its prompt and its own response up to itself; padding attends to padding."""
    T = tree.shape[1]
    same_tree = tree[:, :, None] == tree[:, None, :]
    same_branch = branch[:, :, None] == branch[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=tree.device).tril()
    return (causal & same_tree & (same_branch | (branch == 0)[:, None, :]))[:, None]


def block_mask(tree: Tensor, branch: Tensor) -> Any:
    """`dense_mask` as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (branch[b, q] == branch[b, k]) | (branch[b, k] == 0)
        return (q >= k) & (tree[b, q] == tree[b, k]) & own

    B, T = tree.shape
    return create_block_mask(sees, B, None, T, T, device=tree.device)


def _name(model: Any) -> str | None:
    return getattr(model.config.get_text_config(), "_attn_implementation", None)
