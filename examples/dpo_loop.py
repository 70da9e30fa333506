"""DPO by hand: a tiny random Llama learns which answer is preferred. Run: python examples/dpo_loop.py"""

import copy

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from cpo_kernels import FusedLinearCPOLoss
from cpo_kernels.integrations.transformers import causal_lm_inputs, causal_lm_logps, lm_head

PAIRS = [(f"Q: {i}+{i}?\nA: ", f"{2 * i}", f"{2 * i + 1}") for i in range(8)]  # prompt, chosen, rejected


def collate(pairs):
    """Bytes as tokens; all chosen rows, then all rejected ones: the layout that the loss takes without `pairs`."""
    rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    ids = [torch.tensor(list((p + answer).encode())) for p, answer in rows]
    marks = [(torch.arange(len(row)) >= len(p.encode())).long() for row, (p, _) in zip(ids, rows, strict=True)]
    input_ids, attention_mask = (pad_sequence(x, True) for x in (ids, [torch.ones_like(row) for row in ids]))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": pad_sequence(marks, True)}


def main():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    policy = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    loss_fn = FusedLinearCPOLoss(beta=0.1, **lm_head(policy).options)
    batch = collate(PAIRS)
    with torch.no_grad():
        ref_logps = causal_lm_logps(reference, batch).sum(1)  # [S]
    for step in range(41):
        out = loss_fn(*causal_lm_inputs(policy, batch), ref_logps=ref_logps)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:2d}  loss {out.loss.item():.3f}  accuracy {out.accuracy.item():.2f}")


if __name__ == "__main__":
    main()
