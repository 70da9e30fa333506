"""One chunk of rows under a trainable head: its log-probs, then the gradients for the coefficients of its rows.

The logits wait in the head's buffer until the loss has given each row its coefficient c_t. They are then overwritten
with G = c (onehot - softmax), from which dX = G W and dW = G^T X are each rounded once. Overwriting them with
onehot - softmax while the log-probs are computed would save one read of them, but round dX and the rows of X a second
time, after the multiplication by c. In bfloat16, on 1,024 rows of SmolLM2 with labels of the text, the error of dX
would be 2.9e-3 in place of 2.6e-3, that of dW 2.8e-3 in place of 2.5e-3. The read takes 1% of a step on a CPU; on a
GPU, by bytes, 61 / H of the products' time, 1.5% at H = 4096 (not measured).
"""

from torch import Tensor

from cpo_kernels.head.grads import WeightGrad, split_coef
from cpo_kernels.head.inputs import Execution, Head, Logits, RowLogps
from cpo_kernels.head.label_remainder import product_dx
from cpo_kernels.head.live import LiveDx, exact_rows, live_sets, no_sums


class Chunk:
    """logps: of the rows. The logits stay in the buffer of `head`, which nothing else may use before `grads`.

    inputs: the arguments of `Head.forward`.
    """

    def __init__(self, head: Head, inputs: tuple[Tensor, Tensor, bool, Tensor | None], execution: Execution) -> None:
        self.head, self.execution = head, execution
        self.x, self.labels, extras, ref = inputs
        self.pieces: list[tuple[slice, Logits]] = []
        parts: list[RowLogps] = []
        pieces = execution.pieces(self.x.shape[0])
        for rows in pieces:
            piece = head if len(pieces) == 1 else head.at(rows)
            own_ref = None if ref is None else ref[rows]
            logits, logps = piece.forward(self.x[rows], self.labels[rows], extras, own_ref)
            self.pieces.append((rows, logits))
            parts.append(logps)
        self.logps = RowLogps.joined(parts)

    def grads(self, coef: Tensor, dx: Tensor, sums: WeightGrad) -> tuple[Tensor, Tensor]:
        """The gradients of sum_t coef_t logp_t, coef [n]: dW and db are added to `sums`, and dX [n, H] is written to
        dx, unless that is [0]. Overwrites the logits.

        Returns the factors [n] by which the rows of dx are yet to be multiplied, and `LiveSets.sums` [3].
        """
        head, execution = self.head, self.execution
        of_g, left = split_coef(coef, self.x.dtype)
        filtered = execution.filter_eps > 0 and dx.numel() > 0
        of_dx = coef.clone() if filtered else left  # the gradients of live sets have no coefficients
        live_dx, live_sums = LiveDx(head), no_sums(self.x)
        for rows, logits in self.pieces:
            labels, lse, dx_rows = self.labels[rows], self.logps.lse[rows], dx[rows]
            if filtered:
                sets = live_sets(head, logits, labels, lse, execution.filter_eps, execution.set_rows)
            head.kernels.token_logps_bwd_(logits.z, labels, lse, of_g[rows], *head.options, logits.anchors)
            if filtered:
                for exact in exact_rows(sets):
                    own = logits.rows(exact), labels[exact], lse[exact], of_g[rows][exact]
                    product_dx(head, *own, dx_rows[exact])
                    of_dx[rows][exact] = left[rows][exact]
                live_dx.add(sets, dx_rows)
                live_sums += sets.sums(labels, head.options)
            elif dx.numel():
                product_dx(head, logits, labels, lse, of_g[rows], dx_rows)
        live_dx.write()
        sums.add(head.rows(self.x.shape[0]), self.x, left)
        return of_dx, live_sums
