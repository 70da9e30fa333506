"""Controllable Preference Optimization by hand: four rated answers, and a condition that decides which is best.

The condition is in the prompt as tags and in the loss as numbers. Under each condition every answer is worth
R = -mean |rating - requested level|. Four forward passes give all six pairs of the four answers, and the policy learns
to prefer what is requested. Run: python examples/conditioned_loop.py
"""

import copy
from itertools import combinations

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from cpo_kernels import FusedLinearCPOLoss, Objective, TagTemplate
from cpo_kernels.integrations.transformers import causal_lm_inputs, causal_lm_logps, lm_head

OBJECTIVES = [Objective("honesty", 1, 5), Objective("helpfulness", 1, 5)]
TAGS = TagTemplate(OBJECTIVES)
QUESTION = "Will it rain?\n"
ANSWERS = {"It will.": (1, 5), "I think so: 80%.": (5, 5), "No idea.": (5, 1), "Frogs.": (1, 1)}  # honesty, helpfulness
CONDITIONS = [(5, 5), (5, 1), (1, 5), (1, 1)]


def collate():
    """Sequence 4 c + a is answer a under condition c."""
    rows = []
    for condition in CONDITIONS:
        prompt = TAGS.render({o.name: level for o, level in zip(OBJECTIVES, condition, strict=True)}) + QUESTION
        rows += [(prompt, answer) for answer in ANSWERS]
    ids = [torch.tensor(list((prompt + answer).encode())) for prompt, answer in rows]
    marks = [(torch.arange(len(row)) >= len(prompt)).long() for row, (prompt, _) in zip(ids, rows, strict=True)]
    input_ids, attention_mask = (pad_sequence(x, True) for x in (ids, [torch.ones_like(row) for row in ids]))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": pad_sequence(marks, True)}


def main():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    policy = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    loss_fn = FusedLinearCPOLoss(OBJECTIVES, beta=0.1, **lm_head(policy).options)

    batch = collate()
    scores = torch.tensor(list(ANSWERS.values()) * len(CONDITIONS), dtype=torch.float64)  # [S, K]
    pairs = torch.tensor([[4 * c + a, 4 * c + b] for c in range(4) for a, b in combinations(range(4), 2)])  # [P, 2]
    conditions = torch.tensor([c for c in CONDITIONS for _ in range(6)], dtype=torch.float64)  # [P, K]
    with torch.no_grad():
        ref_logps = causal_lm_logps(reference, batch).sum(1)
    for step in range(61):
        given = {"pairs": pairs, "scores": scores, "conditions": conditions, "ref_logps": ref_logps}
        out = loss_fn(*causal_lm_inputs(policy, batch), **given)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            ties = out.num_ties.item()
            print(f"step {step:2d}  loss {out.loss.item():.3f}  accuracy {out.accuracy.item():.2f}  ties {ties}")
    gain = (out.seq_logps - ref_logps).view(4, 4)  # [condition, answer]
    for condition, row in zip(CONDITIONS, gain, strict=True):
        print(f"honesty {condition[0]}, helpfulness {condition[1]}: {list(ANSWERS)[int(row.argmax())]}")


if __name__ == "__main__":
    main()
