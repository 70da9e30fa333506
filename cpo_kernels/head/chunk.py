"""One chunk of rows under a trainable head: its log-probs, then the gradients for the coefficients of its rows.

In bfloat16 the logits wait in the head's buffer until the loss has given each row its coefficient c_t. They are then
overwritten with G = c (onehot - softmax), from which dX = G W and dW = G^T X are each rounded once. With G = onehot -
softmax, dX and the rows of X would be rounded a second time, after the multiplication by c: on 1,024 rows of SmolLM2
with labels of the text the error of dX would be 2.9e-3 in place of 2.6e-3, that of dW 2.8e-3 in place of 2.5e-3. (Where
all coefficients are equal their rounding is that of every row: dW is then better or worse by chance.) The logits are
read once more for that: 1% of a step on a CPU; on a GPU, by bytes, 61 / H of the products' time (not measured).

In other dtypes G = onehot - softmax is computed with the log-probs. float16 lacks the range for coefficients, and in
float32 a softmax from the log-sum-exp has its rounding, the same in a whole row: logits around 300 made dX 30 times
worse.
"""

import torch
from torch import Tensor

from cpo_kernels.head.grads import WeightGrad
from cpo_kernels.head.inputs import Execution, Head, Logits, RowLogps
from cpo_kernels.head.label_remainder import product_dx
from cpo_kernels.head.live import LiveDx, no_sums, take_sets


class Chunk:
    """logps: of the rows. The logits, or G, stay in the buffer of `head`, which nothing else may use before `grads`.

    inputs: the arguments of `Head.forward`. needs_dx: whether `grads` is asked for dX.
    """

    def __init__(
        self,
        head: Head,
        inputs: tuple[Tensor, Tensor, bool, Tensor | None],
        execution: Execution,
        needs_dx: bool,
    ) -> None:
        self.head, self.execution = head, execution
        self.filtered = execution.filter_eps > 0 and needs_dx and inputs[0].shape[0] > 0
        self.waits = inputs[0].dtype == torch.bfloat16
        self.x, self.labels, extras, ref = inputs
        self.pieces: list[tuple[slice, Logits]] = []
        parts: list[RowLogps] = []
        pieces = execution.pieces(self.x.shape[0], execution.limits.piece)
        for rows in pieces:
            piece = head if len(pieces) == 1 else head.at(rows)
            own_ref = None if ref is None else ref[rows]
            compute = piece.forward if self.waits or self.filtered else piece.fused
            logits, logps = compute(self.x[rows], self.labels[rows], extras, own_ref)
            self.pieces.append((rows, logits))
            parts.append(logps)
        self.logps = RowLogps.joined(parts)

    def grads(self, coef: Tensor, dx: Tensor, sums: WeightGrad) -> tuple[Tensor, Tensor]:
        """The gradients of sum_t coef_t logp_t, coef [n]: dW and db are added to `sums`, and dX [n, H] is written to
        dx, unless that is [0]. Overwrites the logits.

        Returns the factors [n] by which the rows of dx are yet to be multiplied, and `Found.filter_sums` [3].
        """
        head, ones = self.head, torch.ones_like(coef)
        of_g, left = (coef, ones) if self.waits else (ones, coef)
        exact, filter_sums = self._live_dx(coef if self.waits else None, dx) if self.filtered else ([], no_sums(self.x))
        for rows, logits in self.pieces if self.waits or self.filtered else ():
            labels, lse = self.labels[rows], self.logps.lse[rows]
            head.kernels.token_logps_bwd_(logits.z, labels, lse, of_g[rows], *head.options, logits.anchors)
        for logits, rows in exact:
            product_dx(head, logits, self.labels[rows], self.logps.logp[rows], of_g[rows], dx[rows])
        if dx.numel() and not self.filtered:
            product_dx(head, self._whole(), self.labels, self.logps.logp, of_g, dx)
        sums.add(head.rows(self.x.shape[0]), self.x, left)
        return left, filter_sums

    def _live_dx(self, coef: Tensor | None, dx: Tensor) -> tuple[list[tuple[Logits, slice]], Tensor]:
        """Writes dX but for the rows of exact sets, which it returns with their logits, and `Found.filter_sums`."""
        live_dx, filter_sums, exact = LiveDx(self.head, self.x.shape[0]), no_sums(self.x), []
        for rows, logits in self.pieces:
            factors = None if coef is None else coef[rows]
            given = logits, self.labels[rows], self.logps.lse[rows], self.execution, live_dx, dx[rows], factors
            parts, sums = take_sets(self.head, *given)
            exact += [(logits.rows(p), slice(rows.start + p.start, rows.start + p.stop)) for p in parts]
            filter_sums += sums
        live_dx.write()
        return exact, filter_sums

    def _whole(self) -> Logits:
        """Of all rows: 3,072 rows in one product take 0.85 of the time of 12 products (576 x 49,152, two cores)."""
        anchors = [logits.anchors for _, logits in self.pieces if logits.anchors is not None]
        return Logits(self.head.rows(self.x.shape[0]), torch.cat(anchors, 1) if anchors else None)
