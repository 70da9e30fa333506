"""Cases of `cpo-kernels check` for a GPU: with a batch plan the host never waits, and a CUDA graph replays the loss."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cpo_kernels.check import limits
from cpo_kernels.check.compare import Backend, Case, Findings, Skip, short
from cpo_kernels.check.head import OBJECTIVES, TRAIN, VOCAB, Batch, budget_bytes, make_batch
from cpo_kernels.head.nll import linear_nll
from cpo_kernels.losses.fused import FusedLinearCPOLoss

DTYPES = (torch.bfloat16, torch.float32)
ROW_BUDGETS = (("one-chunk", None), ("chunks", 48), ("two-pass", 7))
BETA = 0.3


def need_gpu(backend: Backend) -> None:
    if not backend.on_gpu:
        raise Skip("needs a GPU")


def step_of(
    backend: Backend, dtype: torch.dtype, rows: int | None, train: str, all_positions: bool
) -> tuple[Batch, Callable[[], list[Tensor]]]:
    """A batch on the device, and a function that runs the loss under a plan and returns the loss and its gradients."""
    cpu = make_batch(bias=False, seed=11)
    loss_fn = FusedLinearCPOLoss(OBJECTIVES, BETA, memory_budget=budget_bytes(rows, dtype), impl=backend.name)
    scores, conditions = (None, None) if all_positions else (cpu.scores, cpu.conditions)
    plan = loss_fn.plan(cpu.labels, VOCAB, dtype, None, None, scores, conditions, backend.device, all_positions)
    plan, batch = plan.to(backend.device), cpu.to(backend, dtype, TRAIN[train])
    num_pairs = 3.0 if all_positions else None  # a graph's chunks take their divisor from the caller

    def step() -> list[Tensor]:
        out = loss_fn(
            batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps, scores=batch.scores,
            conditions=batch.conditions, num_pairs=num_pairs, plan=plan,
        )  # fmt: skip
        return [out.loss, out.seq_logps, out.chosen_rewards, *torch.autograd.grad(out.loss, batch.leaves(TRAIN[train]))]

    return batch, step


def waiting_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for name, rows in ROW_BUDGETS:
            for train in TRAIN:

                def loss(
                    backend: Backend, findings: Findings, dtype: torch.dtype = dtype, rows: int | None = rows,
                    train: str = train,
                ) -> None:  # fmt: skip
                    need_gpu(backend)
                    _, step = step_of(backend, dtype, rows, train, False)
                    want = step()  # compiles
                    torch.cuda.synchronize(backend.device)
                    torch.cuda.set_sync_debug_mode("error")
                    try:
                        got = step()
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                    for k, (a, b) in enumerate(zip(got, want, strict=True)):
                        findings.same(f"result {k}", a, b)

                yield Case(f"no-wait/{short(dtype)}/FusedLinearCPOLoss,{train},{name}", loss, train == "all")

        def supervised(backend: Backend, findings: Findings, dtype: torch.dtype = dtype) -> None:
            need_gpu(backend)
            batch = make_batch(bias=False, seed=12)
            index = (batch.labels.flatten() != -100).nonzero().squeeze(1).to(backend.device)
            batch = batch.to(backend, dtype, TRAIN["all"])

            def step() -> Tensor:
                return linear_nll(batch.hidden, batch.weight, batch.labels, index=index, impl=backend.name)

            want = torch.autograd.grad(step(), batch.leaves(TRAIN["all"]))
            torch.cuda.synchronize(backend.device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = torch.autograd.grad(step(), batch.leaves(TRAIN["all"]))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            findings.same("dX", got[0], want[0])
            findings.same("dW", got[1], want[1])

        yield Case(f"no-wait/{short(dtype)}/linear_nll", supervised, True)


def graph_cases() -> Iterator[Case]:
    """A graph captured over one batch, replayed over others whose labelled positions and ratings differ."""
    for dtype in DTYPES:
        for name, rows in ROW_BUDGETS:
            for train in ("all", "frozen"):

                def run(
                    backend: Backend, findings: Findings, dtype: torch.dtype = dtype, rows: int | None = rows,
                    train: str = train,
                ) -> None:  # fmt: skip
                    need_gpu(backend)
                    batch, step = step_of(backend, dtype, rows, train, True)
                    side = torch.cuda.Stream(backend.device)
                    side.wait_stream(torch.cuda.current_stream(backend.device))
                    with torch.cuda.stream(side):
                        for _ in range(3):
                            step()
                    torch.cuda.current_stream(backend.device).wait_stream(side)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        captured = step()
                    for seed in (21, 22):
                        fresh = make_batch(bias=False, seed=seed).to(backend, dtype, (False, False))
                        with torch.no_grad():
                            for mine, other in zip(vars(batch).values(), vars(fresh).values(), strict=True):
                                if mine is not None:
                                    mine.copy_(other)
                        graph.replay()
                        got = [t.clone() for t in captured]
                        for k, (a, b) in enumerate(zip(got, step(), strict=True)):
                            findings.close(
                                f"result {k} of batch {seed}", a, b, limits.GRAPH[dtype], b.double().abs().max()
                            )

                yield Case(f"cuda-graph/{short(dtype)}/{train},{name}", run, name == "one-chunk")


def gpu_cases() -> Iterator[Case]:
    yield from waiting_cases()
    yield from graph_cases()
