"""A whole training step of a transformers model: TRL's DPOTrainer as it is, with our head, and a plain loop of ours.

Reference log-probs are given, as with `precompute_ref_log_probs`. AdamW runs with learning rate 0: it does all its work
and every step starts from the same weights.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.bench.head import BETA
from cpo_kernels.bench.subject import Family, Outcome, Step, Subject
from cpo_kernels.environment import installed

# Random weights take the time that trained ones take.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=1999),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainingStep:
    """`model`: a name of MODELS (random weights) or the path of a causal language model.

    `groups` prompts with `responses` each, all pairs of a group. TRL takes pairs: a response that stands in several
    runs through the model as often.
    """

    model: str = "tiny"
    groups: int = 2
    responses: int = 2
    length: int = 32
    prompt: int = 16
    dtype: str = "bfloat16"

    @property
    def sequences(self) -> int:
        return self.groups * self.responses

    @property
    def completion_tokens(self) -> int:
        """Of distinct responses."""
        return self.sequences * (self.length - self.prompt)


class Batch:
    def __init__(self, workload: TrainingStep, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        w, self.workload, self.device = workload, workload, device
        self.folder = tempfile.TemporaryDirectory()  # of the trainers' files
        torch.manual_seed(0)
        if w.model in MODELS:
            sizes = MODELS[w.model]
            self.model: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
        else:
            self.model = AutoModelForCausalLM.from_pretrained(w.model, dtype=torch.float32)
        self.model = self.model.to(device)
        g = torch.Generator().manual_seed(0)
        vocab = self.model.config.vocab_size
        self.input_ids = torch.randint(4, vocab, (w.sequences, w.length), generator=g).to(device)
        self.labels = self.input_ids.clone()
        self.labels[:, : w.prompt] = -100
        self.pairs = torch.tensor(
            [(a * w.groups + i, b * w.groups + i) for a, b in combinations(range(w.responses), 2)
             for i in range(w.groups)], device=device,
        )  # fmt: skip
        self.ref_logps = torch.full((w.sequences,), -10.0 * (w.length - w.prompt), device=device)

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.workload.dtype == "bfloat16")

    def step(self, loss_and_backward: Callable[[], Tensor], optimizer: Any) -> Step:
        def run() -> Outcome:
            optimizer.zero_grad()
            loss = loss_and_backward()
            optimizer.step()
            return {"loss": loss.detach(), "dw": self.head.grad}  # type: ignore[dict-item]

        return Step(run)


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)


def loop(b: Batch) -> Step:
    """The backbone, then `FusedLinearCPOLoss`: every response once, 3 products on the completions."""
    loss_fn = cpo.FusedLinearCPOLoss(beta=BETA)
    backbone, dtype = b.model.base_model, getattr(torch, b.workload.dtype)
    labels = b.labels[:, 1:]
    plan = loss_fn.plan(labels.cpu(), b.head.shape[0], dtype, b.pairs.cpu(), device=b.device).to(b.device)

    def loss_and_backward() -> Tensor:
        with b.autocast():
            hidden = backbone(input_ids=b.input_ids, use_cache=False).last_hidden_state[:, :-1]
            loss = loss_fn(hidden, b.head, labels, ref_logps=b.ref_logps, plan=plan).loss
        loss.backward()
        return loss

    return b.step(loss_and_backward, adamw(b.model))


def word_tokenizer() -> Any:
    """What a trainer wants at its construction; the batch holds tokens already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def trainer(fused: bool) -> Callable[[Batch], Step]:
    def build(b: Batch) -> Step:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        import datasets
        import trl

        from cpo_kernels.integrations.trl import FusedDPOConfig, FusedDPOTrainer

        datasets.disable_progress_bars()
        w = b.workload
        args = (FusedDPOConfig if fused else trl.DPOConfig)(
            b.folder.name, beta=BETA, precompute_ref_log_probs=True, bf16=w.dtype == "bfloat16",
            use_cpu=b.device.type == "cpu", gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        data = datasets.Dataset.from_dict({"prompt": ["a ", "b "], "chosen": ["a", "b"], "rejected": ["b", "a"]})
        made = (FusedDPOTrainer if fused else trl.DPOTrainer)(
            b.model, args=args, train_dataset=data, processing_class=word_tokenizer()
        )
        made.current_gradient_accumulation_steps = 1  # what its train() sets
        model, optimizer = made.accelerator.prepare(made.model, adamw(b.model))
        made.model_wrapped = model
        rows = b.pairs.t().flatten()  # chosen of every pair, then rejected
        chosen, rejected = b.ref_logps[rows].chunk(2)
        inputs = {
            "input_ids": b.input_ids[rows],
            "attention_mask": torch.ones_like(b.input_ids[rows]),
            "completion_mask": (b.labels[rows] != -100).long(),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        return b.step(lambda: made.training_step(model, dict(inputs)), optimizer)

    return build


def truth(b: Batch) -> Outcome:
    """Full logits in float32."""
    hidden_labels = b.labels[:, 1:]
    logits = b.model(input_ids=b.input_ids, use_cache=False).logits[:, :-1].float()
    logp = logits.log_softmax(-1).gather(-1, hidden_labels.clamp(min=0)[..., None]).squeeze(-1)
    d = (logp * (hidden_labels != -100)).sum(1) - b.ref_logps
    loss = -F.logsigmoid(BETA * (d[b.pairs[:, 0]] - d[b.pairs[:, 1]])).mean()
    (dw,) = torch.autograd.grad(loss, b.head)
    return {"loss": loss.detach(), "dw": dw}


def limits(workload: TrainingStep) -> dict[str, float]:
    """In bfloat16 the whole backbone rounds, not the head alone."""
    return {"loss": 0.05, "dw": 0.2} if workload.dtype == "bfloat16" else {"loss": 1e-4, "dw": 1e-3}


def needs(*packages: str) -> Callable[[TrainingStep, torch.device], str]:
    def refuses(workload: TrainingStep, device: torch.device) -> str:
        return next((f"{name} is not installed" for name in packages if not installed(name)), "")

    return refuses


WITH_TRL = needs("transformers", "datasets", "trl")
SUBJECTS = {
    "trl": Subject("TRL's DPOTrainer", trainer(False), refuses=WITH_TRL),
    "fused_trl": Subject("FusedDPOTrainer", trainer(True), refuses=WITH_TRL),
    "loop": Subject("a plain loop with FusedLinearCPOLoss", loop, refuses=needs("transformers")),
}
FAMILY = Family(TrainingStep, Batch, SUBJECTS, "trl", truth, limits)
