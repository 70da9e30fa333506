"""A head that is too large for one device: each rank holds some of its rows, and DPO trains it as one head.

Every rank sees the same hidden states and labels; the ranks exchange two numbers per token and, backward, their shares
of the hidden states' gradient. Run: torchrun --nproc-per-node 2 examples/tensor_parallel_head.py
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (holds the group that is there when it is first imported, past its end)

from cpo_kernels import FusedLinearCPOLoss, VocabShards, linear_token_logps

PAIRS, LENGTH, HIDDEN, VOCAB = 4, 6, 32, 1000


def main():
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")

    torch.manual_seed(0)  # the same on every rank: what tensor parallelism replicates
    body = torch.nn.Sequential(torch.nn.Embedding(VOCAB, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh())
    tokens = torch.randint(VOCAB, (2 * PAIRS, LENGTH + 1)).to(device)  # all chosen rows, then all rejected ones
    weight = torch.randn(VOCAB, HIDDEN) * 0.1
    rows = weight.tensor_split(world)[rank]  # a real model loads only these rows
    head = torch.nn.Parameter(rows.clone().to(device))
    body.to(device)
    shards = VocabShards.of(head, dist.group.WORLD)

    labels = tokens[:, 1:]
    with torch.no_grad():
        ref_logps = linear_token_logps(body(tokens[:, :-1]), head, labels, vocab_shards=shards).sum(1)
    optimizer = torch.optim.AdamW([*body.parameters(), head], lr=3e-3)
    loss_fn = FusedLinearCPOLoss(beta=0.1)
    for step in range(31):
        out = loss_fn(body(tokens[:, :-1]), head, labels, ref_logps=ref_logps, vocab_shards=shards)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and rank == 0:
            print(f"step {step:2d}  loss {out.loss.item():.4f}  accuracy {out.accuracy.item():.2f}  rows {shards.rows}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
