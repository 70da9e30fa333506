"""Steps of TRL's trainers on batches of tokens (`b` is a `training_step.Batch`)."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.bench.implementation import BETA, Step
from cpo_kernels.environment import installed


def needs(*packages: str) -> Callable[[Any, torch.device], str]:
    def refuses(workload: Any, device: torch.device) -> str:
        return next((f"{name} is not installed" for name in packages if not installed(name)), "")

    return refuses


WITH_TRL = needs("transformers", "datasets", "trl")


def word_tokenizer() -> Any:
    """What a trainer wants at its construction; the batch holds tokens already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def arguments(b: Any) -> dict[str, Any]:
    """What the arguments of every trainer of TRL hold here."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import datasets

    datasets.disable_progress_bars()
    return {
        "output_dir": b.folder.name, "bf16": b.workload.dtype == "bfloat16", "use_cpu": b.device.type == "cpu",
        "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def step(b: Any, made: Any, inputs: dict[str, Any]) -> Step:
    """A step of a trainer of TRL on a batch of tokens."""
    made.current_gradient_accumulation_steps = 1  # what its train() sets
    model, optimizer = made.accelerator.prepare(made.model, b.adamw())
    made.model_wrapped = model
    made_step: Step = b.step(lambda: made.training_step(model, dict(inputs), None), optimizer)
    return made_step


def pair_inputs(b: Any) -> dict[str, Tensor]:
    """The batch of DPO: chosen of every pair, then rejected; the reference is given."""
    rows = b.pairs.t().flatten()
    ref_chosen, ref_rejected = b.ref_logps[rows].chunk(2)
    return {
        "input_ids": b.input_ids[rows],
        "attention_mask": b.mask[rows],
        "completion_mask": (b.labels[rows] != -100).long(),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }


def dpo(fused: bool = False, reference: str = "given") -> Callable[[Any], Step]:
    def build(b: Any) -> Step:
        import datasets
        import trl

        from cpo_kernels.integrations.trl import FusedDPOConfig, FusedDPOTrainer

        args = (FusedDPOConfig if fused else trl.DPOConfig)(
            **arguments(b), beta=BETA, precompute_ref_log_probs=reference == "given"
        )
        data = datasets.Dataset.from_dict({"prompt": ["a ", "b "], "chosen": ["a", "b"], "rejected": ["b", "a"]})
        twin = copy.deepcopy(b.model) if reference == "computed" else None
        made = (FusedDPOTrainer if fused else trl.DPOTrainer)(
            b.model, twin, args=args, train_dataset=data, processing_class=word_tokenizer()
        )
        inputs = pair_inputs(b)
        if reference == "computed":
            del inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return step(b, made, inputs)

    return build
