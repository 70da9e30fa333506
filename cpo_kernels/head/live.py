"""Gradients of the head on the live columns of the vocabulary: `filter_eps`.

A set is `SET_ROWS` consecutive rows of a chunk. Its gradient g = dlogp / du is split by `reference.live_columns` into
the columns A in which some row reaches eps, and tau q^T for the rest, so that with coefficients c_t

    dX_t = c_t (g_{t,A} W_A + tau_t (q^T W))        dW_A += g_A^T (c X),   dW += q (sum_t c_t tau_t x_t)^T

A trained model leaves 5 to 15% of the columns live, and both products shrink to that. The forward product stays whole:
log-probs are exact. A set with too many live columns keeps the exact path, in which backward makes its logits again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends.vocab_parallel import columns_here
from cpo_kernels.head.grads import scale_rows, sum_powers
from cpo_kernels.head.inputs import Head
from cpo_kernels.head.matmul import product
from cpo_kernels.head.strategy import chunks, even_rows

SET_ROWS = 128
LIVE_LIMIT = 0.5  # of the columns
TAIL_UNIT = 1024.0  # q is kept as 1024 q: in float16 neither its elements nor their products with W leave the range
TILE_ELEMENTS = 2**23  # of the sets' products that are added at a time


@dataclass
class LiveSets:
    """The gradients of some rows, set by set."""

    g: Tensor  # [g_A, tau] of every set in turn, [n_k, a_k + 1] each
    columns: Tensor  # [sum a_k], rising within a set
    offsets: list[int]  # set k has columns[offsets[k] : offsets[k + 1]]
    exact: list[bool]  # sets with too many live columns: they have none here
    tail: Tensor  # [sets, V] TAIL_UNIT * q
    num_rows: int
    set_rows: int

    def rows(self, k: int) -> slice:
        return slice(k * self.set_rows, min((k + 1) * self.set_rows, self.num_rows))

    def grads(self) -> list[Tensor]:
        """[n_k, a_k + 1] of every set."""
        sizes = [self.rows(k).stop - self.rows(k).start for k in range(len(self.exact))]
        widths = [high - low + 1 for low, high in zip(self.offsets, self.offsets[1:], strict=False)]
        parts = self.g.split([n * a for n, a in zip(sizes, widths, strict=True)])
        return [part.view(n, a) for part, n, a in zip(parts, sizes, widths, strict=True)]


def live_sets(head: Head, z: Tensor, labels: Tensor, lse: Tensor, eps: float, set_rows: int) -> LiveSets:
    """Splits the gradient of a chunk's logits z [n, V], which stay as they are."""
    options = head.options
    live, tail, row_sums = head.kernels.live_columns(z, labels, lse, eps, set_rows, *options)
    counts = live.sum(1).tolist()
    exact = [count > LIVE_LIMIT * live.shape[1] for count in counts]
    if any(exact):
        live[torch.tensor(exact, device=live.device)] = False
        counts = [0 if whole else count for count, whole in zip(counts, exact, strict=True)]
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    columns = torch.nonzero_static(live, size=offsets[-1])[:, 1].contiguous()
    g = head.kernels.live_grads(z, labels, lse, row_sums, columns, torch.tensor(offsets), set_rows, *options)
    total = tail.sum(1, keepdim=True)
    q = (tail * (TAIL_UNIT / torch.where(total > 0, total, 1.0))).to(z.dtype)
    return LiveSets(g, columns, offsets, exact, q, z.shape[0], set_rows)


def live_dx(head: Head, sets: LiveSets, z: Tensor, labels: Tensor, lse: Tensor, dx: Tensor) -> None:
    """dX [n, H] of the sum of the log-probs. Rows of z in exact sets are overwritten."""
    weight, ones = head.weight, torch.ones_like(lse)
    means = product(sets.tail, weight, weight.new_empty(len(sets.exact), weight.shape[1])) / TAIL_UNIT  # [sets, H]
    for k, g in enumerate(sets.grads()):
        rows = sets.rows(k)
        if sets.exact[k]:
            head.kernels.token_logps_bwd_(z[rows], labels[rows], lse[rows], ones[rows], *head.options)
            product(z[rows], weight, dx[rows])
            continue
        columns = sets.columns[sets.offsets[k] : sets.offsets[k + 1]]
        rows_of_weight = weight.new_empty(len(columns) + 1, weight.shape[1])  # W_A and the tail's mean row
        torch.index_select(weight, 0, columns, out=rows_of_weight[:-1])
        rows_of_weight[-1] = means[k]
        product(g, rows_of_weight, dx[rows])


def tile_rows(sets: LiveSets, shape: torch.Size) -> int:
    """Rows of W whose products of all sets come to about TILE_ELEMENTS."""
    return max(1, TILE_ELEMENTS * shape[0] // (max(1, len(sets.columns)) * shape[1]))


def live_head_grads(
    head: Head, sets: LiveSets, x: Tensor, coef: Tensor, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor]:
    """dW [V, H] and db [V] of sum_t coef_t logp_t over the sets that are not exact, rounded once."""
    weight, acc = head.weight, library.acc_dtype(x.dtype)
    grads = sets.grads()
    power, _ = sum_powers(coef, x, abs(head.options.scale))
    scaled = scale_rows(x, coef / power)  # [n, H]
    tails = torch.stack([g[:, -1].to(acc) @ scaled[sets.rows(k)].to(acc) for k, g in enumerate(grads)]) / TAIL_UNIT
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    db = weight.new_empty(weight.shape[0] if need_db else 0, dtype=acc)
    columns = [sets.columns[low:high] for low, high in zip(sets.offsets, sets.offsets[1:], strict=False)]
    tiles = chunks(weight.shape[0], even_rows(weight.shape[0], tile_rows(sets, weight.shape)))
    edges = torch.tensor([low for low, _ in tiles] + [weight.shape[0]])
    bounds = [torch.searchsorted(ids, edges).tolist() for ids in columns]  # [sets, tiles + 1]
    for i, (low, high) in enumerate(tiles):
        spans = [(of_set[i], of_set[i + 1]) for of_set in bounds]
        offsets = torch.tensor([0] + [b - a for a, b in spans]).cumsum(0)
        made = weight.new_empty(int(offsets[-1]), weight.shape[1])
        ids = torch.cat([c[a:b] for c, (a, b) in zip(columns, spans, strict=True)]) - low
        at = 0
        for k, (a, b) in enumerate(spans):
            if b > a:
                product(grads[k][:, a:b].t(), scaled[sets.rows(k)], made[at : at + b - a])
            at += b - a
        dw[low:high] = head.kernels.live_sum(sets.tail[:, low:high], tails, made, ids, offsets)
    return dw, db
