"""A judge of answers that is trained on human ratings: logistic regression on what the published model reads.

An answer's features are the published model's hidden states over its tokens, after the question, averaged. Per
objective a classifier of "rated high" or "rated low" is fitted on the answers to training questions, both classes with
equal weight; `accuracy` is measured on the ratings that people gave to answers to held-out questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cpo_kernels.data.records import Prompt, Record, Response
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.head.matmul import cpu_multiplies
from cpo_kernels.objectives import Objective

# Chosen on training questions: of six depths, alone and together, and penalties 1e-3 to 1e-1 what was right most often.
DEPTHS = (1 / 2, 2 / 3, 5 / 6)  # of the model's layers
PENALTY = 0.1  # times the squared norm of the coefficients of standardised features, beside the mean log loss


class AnswerClassifier:
    """Fitted on all rated answers of `records`, or as it was fitted before: what `state` gave."""

    def __init__(
        self,
        model: torch.nn.Module,
        template: PromptTemplate,
        records: Sequence[Record],
        objectives: Sequence[Objective],
        state: dict[str, Tensor] | None = None,
    ):
        self.objectives, self.template = objectives, template
        dtype = torch.bfloat16 if cpu_multiplies(torch.bfloat16) else torch.float32
        self.model = type(model)(model.config).to(dtype).eval()
        self.model.load_state_dict(model.state_dict())
        if state is None:
            x, high = self.rated(records)
            mean, std = x.mean(0), x.std(0) + 1e-6
            x = (x - mean) / std
            weights = torch.stack([fitted(x, high[:, k]) for k in range(len(objectives))])  # [K, 1 + features]
            state = {"mean": mean, "std": std, "weights": weights}
        self.state = state

    def rated(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Features `[n, F]` of rated answers, and whether each objective is rated high, `[n, K]`."""
        asked, ratings = list[tuple[Prompt, str]](), list[list[bool]]()
        for record in records:
            for text, response in {r.text: r for r in record.responses}.items():
                asked.append((record.prompt, text))
                ratings.append([response.ratings[o.name] > (o.low + o.high) / 2 for o in self.objectives])
        return self.features(asked), torch.tensor(ratings)

    @torch.no_grad()
    def features(self, asked: Sequence[tuple[Prompt, str]], batch_size: int = 64) -> Tensor:
        """`[n, len(DEPTHS) * H]` float64: hidden states at DEPTHS, averaged over the answer and its end token."""
        coded = [self.template.encode(prompt, None, [Response(text)])[:2] for prompt, text in asked]
        order = sorted(range(len(coded)), key=lambda i: len(coded[i][0]) + len(coded[i][1][0]))
        layers = [round(depth * self.model.config.num_hidden_layers) for depth in DEPTHS]
        found = torch.empty(len(coded), len(layers) * self.model.config.hidden_size, dtype=torch.float64)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            whole = [(*prompt, *answer) for prompt, (answer,) in (coded[i] for i in part)]
            longest = max(map(len, whole))
            ids = torch.tensor(
                [[*row, *[0] * (longest - len(row))] for row in whole]
            )  # causal: the padding is not seen
            states = self.model.model(input_ids=ids, output_hidden_states=True).hidden_states
            for j, i in enumerate(part):
                begin, end = len(coded[i][0]), len(whole[j])
                found[i] = torch.cat([states[layer][j, begin:end].double().mean(0) for layer in layers])
        return found

    def judged(self, x: Tensor) -> Tensor:
        """`[n, K]`: whether each objective is judged high, from features."""
        x = (x - self.state["mean"]) / self.state["std"]
        return x @ self.state["weights"][:, 1:].T + self.state["weights"][:, 0] > 0

    def rate(self, asked: Sequence[tuple[Prompt, str]]) -> list[list[float]]:
        """`[n][K]`: each objective's lowest or highest rating."""
        high = self.judged(self.features(asked)).tolist()
        return [[float(o.high if h else o.low) for o, h in zip(self.objectives, row, strict=True)] for row in high]

    def accuracy(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Per objective, of answers that people rated low and of those they rated high: the share judged so."""
        x, high = self.rated(records)
        right = (self.judged(x) == high).double()
        return {
            o.name: {
                kind: right[high[:, k] == value, k].mean().item() for kind, value in (("low", False), ("high", True))
            }
            for k, o in enumerate(self.objectives)
        }


def fitted(x: Tensor, high: Tensor) -> Tensor:
    """Intercept and coefficients that minimise mean log loss + PENALTY |coefficients|^2; each class is half of it."""
    weights = torch.zeros(1 + x.shape[1], dtype=torch.float64, requires_grad=True)
    target = high.double()
    balance = torch.where(high, 0.5 / target.mean(), 0.5 / (1 - target).mean())
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[1:] + weights[0]
        loss = binary_cross_entropy_with_logits(logits, target, balance) + PENALTY * weights[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()
