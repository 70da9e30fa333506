"""A head sharded over 2 and 4 processes against one process: values, gradients, what is sent, and misuse."""

import functools
import math
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import cpo_kernels as cpo
from cpo_kernels.backends import dispatch, vocab_parallel
from tests.support.heads import make_batch, relative_error
from tests.support.processes import run_processes

pytestmark = pytest.mark.distributed

VOCAB, ROW = 101, 101 * 8
# Rows by number of ranks. In `even` the last rank has fewer; `far` leaves the labels, below 60, to one rank.
LAYOUTS = {
    2: {"even": (51, 50), "uneven": (13, 88), "empty": (0, 101), "far": (60, 41)},
    4: {"even": (26, 26, 26, 23), "uneven": (40, 1, 57, 3), "empty": (50, 0, 51, 0), "far": (60, 20, 20, 1)},
}
UPSTREAM = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PAIRS = torch.tensor([[0, 2], [1, 3], [3, 0]])
HEADS = {"plain": {}, "softcap": {"softcap": 3.0, "scale": 0.25}, "padded": {"vocab_size": 90}}


def batch_of(case):
    batch = make_batch(bias=case.get("bias", True))
    batch.labels[batch.labels >= 60] -= 50
    if case.get("masked"):  # a tokenizer's unused tokens, a whole shard of them
        with torch.no_grad():
            batch.bias[60:] = -math.inf
    return batch.to(case.get("dtype", torch.float64))


def head_of(case, batch, shards):
    """(hidden, weight, bias) as leaves, on this rank only its rows; a frozen head where the case says so."""
    rows = slice(None) if shards is None else slice(shards.start, shards.start + shards.rows[dist.get_rank()])
    train = case.get("train_head", True)
    weight, bias = (
        None if t is None else t.detach()[rows].clone().requires_grad_(train) for t in (batch.weight, batch.bias)
    )
    return batch.hidden.detach().requires_grad_(), weight, bias


def token_logps(case, hidden, weight, bias, batch, options):
    options = {**options, **case.get("head", {}), "memory_budget": case.get("budget")}
    if not case.get("extras"):
        return cpo.linear_token_logps(hidden, weight, batch.labels, bias, **options), ()
    logps, extras = cpo.linear_token_logps(hidden, weight, batch.labels, bias, extras=True, **options)
    value = logps + case.get("entropy", 0.0) * extras.entropy
    entropy = extras.entropy.detach()
    return value, (entropy, extras.log_sum_sq_probs, extras.mean_logit.exp(), extras.is_top1.double())


def nll(case, hidden, weight, bias, batch, options):
    options = {**options, "memory_budget": case.get("budget")}
    return cpo.linear_nll(hidden, weight, batch.labels, bias, token_weights=UPSTREAM.exp(), **options), ()


def preference(case, hidden, weight, bias, batch, options):
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=case.get("budget"), **case.get("loss", {}), softcap=6.0)
    given = {"ref_logps": batch.ref_logps}
    if case.get("ref_hidden"):
        given = {"ref_hidden": batch.hidden.detach().flip(0), "ref_bias": None}
        if case["ref_hidden"] == "other":
            given["ref_weight"] = weight.detach() * 0.9
    given["pairs"] = PAIRS
    if case.get("plan"):
        shards = options.get("vocab_shards")
        width = VOCAB if shards is None else max(shards.rows)
        given["plan"] = loss_fn.plan(batch.labels, width, hidden.dtype, given.pop("pairs"), device="cpu")
    out = loss_fn(hidden, weight, batch.labels, bias, **given, **options)
    return out.loss, (out.seq_logps, out.losses, out.chosen_rewards)


def kto(case, hidden, weight, bias, batch, options):
    loss_fn = cpo.FusedLinearKTOLoss(0.3, memory_budget=case.get("budget"), softcap=6.0)
    ref = {"ref_hidden": batch.hidden.detach().flip(0)} if case.get("ref_hidden") else {"ref_logps": batch.ref_logps}
    kl = loss_fn.kl(hidden, weight, batch.labels, bias, ref_hidden=batch.hidden.detach() * 0.5, **options)
    desirable = torch.tensor([True, False, False, True])
    out = loss_fn(hidden, weight, batch.labels, bias, desirable=desirable, kl=kl, **ref, **options)
    return out.loss, (out.seq_logps, out.losses, out.kl)


def unpaired(hidden, weight, labels, bias):
    """KTO with its reference point, all from these hidden states."""
    loss_fn, ref = cpo.FusedLinearKTOLoss(memory_budget=18 * ROW), {"ref_hidden": hidden.detach() * 0.5}
    kl = loss_fn.kl(hidden, weight, labels, bias, **ref)
    return loss_fn(hidden, weight, labels, bias, desirable=labels[:, -1] > 30, kl=kl, **ref).loss


LOSSES = {
    "sigmoid": {},
    "chunks": {"budget": 18 * ROW},  # two sequences at a time
    "two_pass": {"budget": 3 * ROW},
    "wpo": {"loss": {"use_weighting": True}},
    "frozen": {"train_head": False, "budget": 7 * ROW, "loss": {"use_weighting": True}},
    "plan": {"plan": True, "budget": 18 * ROW},
    "ref": {"ref_hidden": "shared"},
    "other_ref": {"ref_hidden": "other"},
}
CASES = {
    **{f"logps-{name}": (token_logps, {"head": head}) for name, head in HEADS.items()},
    **{f"frozen-{name}": (token_logps, {"head": head, "train_head": False}) for name, head in HEADS.items()},
    "logps-chunks": (token_logps, {"budget": 5 * ROW, "bias": False}),
    "logps-masked": (token_logps, {"masked": True}),
    "logps-extras": (token_logps, {"extras": True, "head": {"vocab_size": 90}}),
    "logps-extras-masked": (token_logps, {"extras": True, "masked": True}),
    "logps-entropy": (token_logps, {"extras": True, "entropy": 1.3, "masked": True, "budget": 5 * ROW}),
    "frozen-entropy": (token_logps, {"extras": True, "entropy": -1.3, "train_head": False, "head": HEADS["softcap"]}),
    "nll": (nll, {}),
    "nll-chunks": (nll, {"budget": 5 * ROW}),
    **{f"loss-{name}": (preference, case) for name, case in LOSSES.items()},
    "kto": (kto, {"budget": 18 * ROW}),
    "kto-pieces": (kto, {"budget": 3 * ROW, "ref_hidden": True}),
    "kto-frozen": (kto, {"train_head": False, "ref_hidden": True}),
}


def result(name, shards, dtype=torch.float64):
    """Value, gradients of (hidden, weight, bias) that want one, and the rest."""
    function, case = CASES[name]
    case = {**case, "dtype": dtype}
    batch = batch_of(case)
    leaves = head_of(case, batch, shards)
    value, rest = function(case, *leaves, batch, {} if shards is None else {"vocab_shards": shards})
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    upstream = UPSTREAM.to(value.dtype) if value.dim() else torch.tensor(-1.7, dtype=value.dtype)
    return value.detach(), torch.autograd.grad(value, wanted, upstream), rest


# ------------------------------------------------------------------------------------------------ what the ranks run


def every_case(rank, layouts):
    group = dist.group.WORLD
    seen = {}
    for layout, rows in layouts.items():
        shards = cpo.VocabShards(group, rows)
        names = CASES if layout in ("uneven", "empty") else ["logps-plain", "frozen-softcap", "loss-chunks"]
        seen |= {(layout, name, torch.float64): result(name, shards) for name in names}
    shards = cpo.VocabShards.of(torch.empty(layouts["uneven"][rank], 3), group)
    assert shards.rows == layouts["uneven"]
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("logps-plain", "frozen-plain", "loss-sigmoid"):
            seen["uneven", name, dtype] = result(name, shards, dtype)
    return seen, sent(shards), misuse(shards), dtensors(rank)


def sent(shards):
    """Shapes of all that is sent: by `recompute` in 3 chunks, then by `frozen` in one."""
    calls = []

    def watched(name):
        function = getattr(dist, name)

        def call(*tensors, **kwargs):
            calls.append((name, *(tuple(t.shape) for t in tensors[-1:])))
            return function(*tensors, **kwargs)

        return mock.patch.object(vocab_parallel.dist, name, call)

    batch = batch_of({})
    hidden, weight, bias = head_of({}, batch, shards)
    with watched("all_gather"), watched("all_reduce"):
        budget = 12 * max(shards.rows) * 8
        out = cpo.linear_token_logps(hidden, weight, batch.labels, bias, memory_budget=budget, vocab_shards=shards)
        out.sum().backward()
        cpo.linear_token_logps(hidden, weight.detach(), batch.labels, vocab_shards=shards).sum().backward()
    return calls


def misuse(shards):
    batch = batch_of({})
    hidden, weight, _ = head_of({}, batch, shards)
    changes = [
        {"labels": torch.full_like(batch.labels, VOCAB)},
        {"labels": torch.full_like(batch.labels, -5)},
        {"weight": torch.zeros(weight.shape[0] + 1, 24, dtype=torch.float64)},
        {"vocab_size": VOCAB + 1},
        {"bias": torch.zeros(VOCAB + 7, dtype=torch.float64)},
    ]
    messages = []
    for change in changes:
        given = {"hidden": hidden, "weight": weight, "labels": batch.labels, "vocab_shards": shards, **change}
        with pytest.raises(ValueError) as error:
            cpo.linear_token_logps(**given)
        messages.append(str(error.value))
    with mock.patch.object(
        vocab_parallel, "check_refused"
    ):  # a GPU's labels are not looked at: NaN for only that token
        labels = batch.labels.clone()
        labels[0, -1], labels[1, -1] = VOCAB, -5
        logps = cpo.linear_token_logps(hidden, weight, labels, vocab_shards=shards)
        (grad,) = torch.autograd.grad(logps.sum(), hidden)
        assert logps.isnan().nonzero().tolist() == [[0, 8], [1, 8]] == grad.isnan().all(-1).nonzero().tolist()
    for rows in ((VOCAB,), (0,) * dist.get_world_size(), (-1,) * dist.get_world_size()):
        with pytest.raises(ValueError) as error:
            cpo.VocabShards(dist.group.WORLD, rows)
        messages.append(str(error.value))
    return messages


def dtensors(rank):
    """Tensor-parallel, sequence-parallel (9 positions on 2 or 4 ranks) and data-parallel DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh, batch = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), batch_of({})
    seen = {}
    for name, placement in (("replicated", Replicate()), ("tokens", Shard(1)), ("sequences", Shard(0))):
        hidden = distribute_tensor(batch.hidden.detach(), mesh, [placement]).requires_grad_()
        weight, bias = (distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in batch.leaves[1:])
        loss_fn = cpo.FusedLinearCPOLoss(memory_budget=18 * ROW)
        own = {"pairs": PAIRS, "ref_hidden": hidden.detach() * 0.5}
        loss = loss_fn(hidden, weight, batch.labels, bias, **own).loss
        loss = loss + unpaired(hidden, weight, batch.labels, bias)
        loss = loss + (cpo.linear_token_logps(hidden, weight, batch.labels, bias) * UPSTREAM).sum()
        loss.backward()
        assert hidden.grad.placements == ((placement,) if name != "replicated" else hidden.grad.placements)
        assert weight.grad.placements == (Shard(0),)
        seen[name] = loss.detach(), [t.grad.full_tensor() for t in (hidden, weight, bias)]

    hidden = batch.hidden.detach()[rank % 4 : rank % 4 + 1].requires_grad_()  # this rank's own data
    labels, upstream = (t[rank % 4 : rank % 4 + 1] for t in (batch.labels, UPSTREAM))
    weight, bias = (distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in batch.leaves[1:])
    (cpo.linear_token_logps(hidden, weight, labels, bias) * upstream).sum().backward()
    assert weight.grad.placements == (Shard(0),)
    seen["gathered"] = None, [hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor()]

    whole = distribute_tensor(batch.weight.detach(), mesh, [Replicate()])
    replicated = distribute_tensor(batch.hidden.detach(), mesh, [Replicate()])
    shards = cpo.VocabShards(dist.group.WORLD, (VOCAB,) + (0,) * (world - 1))
    for match, given in (
        ("must be Shard", (replicated, whole)),
        ("hidden is a DTensor but weight is not", (replicated, batch.weight)),
        ("omit vocab_shards", (replicated, weight, None, shards)),
        ("must both be DTensors", (replicated, weight, batch.bias)),
    ):
        hidden, weight_, *rest = given
        bias_, shards_ = [*rest, None, None][:2]
        with pytest.raises(ValueError, match=match):
            cpo.linear_token_logps(hidden, weight_, batch.labels, bias_, vocab_shards=shards_)
    return seen


def on_only_rank_1(rank, change):
    """What each rank is told when the arguments of one are wrong; in a group of its own, which may break."""
    shards, batch = cpo.VocabShards(dist.group.WORLD, (51, 50)), batch_of({})
    hidden, weight, _ = head_of({}, batch, shards)
    labels = batch.labels.clone()
    if rank == 1 and change == "label":
        labels[tuple((labels != -100).nonzero()[5])] = VOCAB
    if rank == 1 and change == "dtype":
        labels = labels.int()
    try:
        cpo.FusedLinearCPOLoss()(hidden, weight, labels, ref_logps=batch.ref_logps, vocab_shards=shards).loss.backward()
    except Exception as error:
        if change == "dtype" and rank == 1:
            os._exit(3)  # what an uncaught exception comes to
        return type(error).__name__, str(error)
    return None


# ------------------------------------------------------------------------------------------------------------- tests


@functools.cache
def ranks(world):
    return run_processes(every_case, world, LAYOUTS[world])


def joined(world, key):
    """Value and gradients put together: the same on every rank, but for the rows of weight and bias."""
    results = [seen[key] for seen, *_ in ranks(world)]
    value, grads, rest = results[0]
    for other, other_grads, other_rest in results[1:]:
        assert torch.equal(other, value) and torch.equal(other_grads[0], grads[0])
        assert all(torch.equal(a, b) for a, b in zip(other_rest, rest, strict=True))
    return value, [grads[0], *(torch.cat(g) for g in zip(*(r[1][1:] for r in results), strict=True))], rest


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", ["even", "uneven", "empty", "far"])
def test_float64_equals_one_process(world, layout):
    names = [name for where, name, dtype in ranks(world)[0][0] if where == layout and dtype == torch.float64]
    assert len(names) == (len(CASES) if layout in ("uneven", "empty") else 3)
    for name in names:
        value, grads, rest = joined(world, (layout, name, torch.float64))
        want, want_grads, want_rest = result(name, None)
        assert relative_error(value, want) < 1e-12, name
        for kind, seen, truth in zip(("hidden", "weight", "bias"), grads, want_grads, strict=False):
            assert relative_error(seen, truth) < 1e-11, (name, kind)
        assert len(rest) == len(want_rest)
        for seen, truth in zip(rest, want_rest, strict=True):
            assert relative_error(seen, truth) < 1e-11, name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["logps-plain", "frozen-plain", "loss-sigmoid"])
def test_float32_rounding(world, name):
    value, grads, _ = joined(world, ("uneven", name, torch.float32))
    want, want_grads, _ = result(name, None)
    assert relative_error(value, want) < 1e-5
    for seen, truth in zip(grads, want_grads, strict=True):
        assert relative_error(seen, truth) < 1e-5


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["logps-plain", "frozen-plain"])
def test_bfloat16_error_is_no_larger_than_naive(world, name):
    """Naive tensor parallelism: products by shard, whose shares of dX are rounded and added."""
    value, grads, _ = joined(world, ("uneven", name, torch.bfloat16))
    truth, true_grads, _ = result(name, None)
    batch = batch_of({"dtype": torch.bfloat16})
    parts = zip(*(t.split(LAYOUTS[world]["uneven"]) for t in (batch.weight, batch.bias)), strict=True)
    logits = torch.cat([torch.nn.functional.linear(batch.hidden, w, b) for w, b in parts], -1).float()
    naive = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1) * (batch.labels != -100)
    naive_grads = torch.autograd.grad(naive, batch.leaves[: len(grads)], UPSTREAM.float())
    for mine, theirs, want in zip((value, *grads), (naive, *naive_grads), (truth, *true_grads), strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, want) <= relative_error(theirs, want) + 1e-3


@pytest.mark.parametrize("world", [2, 4])
def test_two_numbers_per_row_and_one_sum_of_dx_are_all_that_is_sent(world):
    rows = int((batch_of({}).labels != -100).sum())
    assert 12 < rows <= 36
    for _, calls, *_ in ranks(world):
        gathers = [shape for name, shape in calls if name == "all_gather"]
        assert all(shape[0] == 2 for shape in gathers)
        assert sum(shape[1] for shape in gathers) == 2 * rows  # forward of both; backward recomputes by itself
        assert len(gathers) == math.ceil(rows / 12) + 1
        assert [shape for name, shape in calls if name == "all_reduce"] == [(4, 9, 24)] * 2


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_refuses_alike(world):
    matches = ["label 101 is out of range", "label -5 is", "its weight has", r"\[1, 101\]", r"bias must have shape",
               "one number for each of", "not all 0", "must be >= 0"]  # fmt: skip
    for *_, messages, _ in ranks(world):
        assert len(messages) == len(matches)
        for message, match in zip(messages, matches, strict=True):
            assert re.search(match, message), message


def test_a_label_out_of_range_on_one_rank_is_an_error_on_all():
    other, own = run_processes(on_only_rank_1, 2, "label", seconds=60)
    assert own[0] == "ValueError" and own[1].startswith("label 101 is out of range")
    assert other[0] == "ValueError" and re.search(r"row \d+ is \d+ here and out of range on rank 1", other[1])


def _one_cpu_without_bfloat16(rank):
    if rank:
        os.environ["CPO_KERNELS_CPU_ISA"] = "avx2"
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (3000, 64))
    own = weight[32 * rank : 32 * rank + 32].clone().requires_grad_()
    shards = cpo.VocabShards(dist.group.WORLD, (32, 32))
    loss = cpo.linear_nll(hidden.requires_grad_(), own, torch.arange(3000) % 64, vocab_shards=shards)
    return float(loss.detach()), dispatch.cpu_multiplies_bf16()


def test_ranks_on_different_cpus_take_the_same_chunks():
    (first, _), (second, multiplies) = run_processes(_one_cpu_without_bfloat16, 2)
    assert first == second and not multiplies


def test_the_end_of_the_only_rank_that_raised_ends_the_wait_of_the_others():
    with pytest.raises(AssertionError, match=r"exit codes \[0, 3\]"):
        run_processes(on_only_rank_1, 2, "dtype", seconds=60)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("placement", ["replicated", "tokens", "sequences"])
def test_dtensors_say_how_the_head_is_sharded(world, placement):
    batch = batch_of({})
    loss = cpo.FusedLinearCPOLoss()(
        batch.hidden, batch.weight, batch.labels, batch.bias, pairs=PAIRS, ref_hidden=batch.hidden.detach() * 0.5
    ).loss
    loss = loss + unpaired(batch.hidden, batch.weight, batch.labels, batch.bias)
    loss = loss + (cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias) * UPSTREAM).sum()
    want = torch.autograd.grad(loss, batch.leaves)
    for *_, seen in ranks(world):
        value, grads = seen[placement]
        assert relative_error(value, loss) < 1e-12
        for g, w in zip(grads, want, strict=True):
            assert relative_error(g, w) < 1e-11


@pytest.mark.parametrize("world", [2, 4])
def test_a_weight_under_plain_hidden_states_is_gathered_and_its_gradient_averaged(world):
    batch = batch_of({})
    logps = cpo.linear_token_logps(batch.hidden[:world], batch.weight, batch.labels[:world], batch.bias)
    hidden, weight, bias = torch.autograd.grad((logps * UPSTREAM[:world]).sum(), batch.leaves)
    for rank, (*_, seen) in enumerate(ranks(world)):
        grads = seen["gathered"][1]
        assert relative_error(grads[0], hidden[rank : rank + 1]) < 1e-12
        assert relative_error(grads[1], weight / world) < 1e-12
        assert relative_error(grads[2], bias / world) < 1e-12


# torch.distributed.nn keeps the group that is there when it is first imported: not ours to test.
LEAVES_THE_GROUP = """
import sys, weakref, torch
import torch.distributed as dist, torch.distributed.nn
import cpo_kernels as cpo
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
group = dist.new_group([0])
seen = weakref.ref(group)
shards = cpo.VocabShards(group, (9,))
hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (3, 9))
cpo.linear_token_logps(hidden, weight, torch.tensor([0, 4, 8]), vocab_shards=shards).sum().backward()
del shards, group
dist.destroy_process_group()
sys.exit(seen() is not None)
"""
WITHOUT_GROUPS = """
import sys, torch
sys.modules["torch.distributed.distributed_c10d"] = None
vars(torch.distributed).pop("ProcessGroup")
import cpo_kernels
cpo_kernels.VocabShards, cpo_kernels.FusedLinearKTOLoss
"""


def test_a_destroyed_group_is_gone(tmp_path):
    """A gloo group that outlives the interpreter's end can abort the process."""
    assert subprocess.run([sys.executable, "-c", LEAVES_THE_GROUP, tmp_path / "store"], timeout=120).returncode == 0


def test_a_torch_without_process_groups_imports_the_package():
    assert subprocess.run([sys.executable, "-c", WITHOUT_GROUPS], timeout=120).returncode == 0


def test_compiled_without_graph_breaks(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shards, batch = cpo.VocabShards(dist.group.WORLD, (VOCAB,)), batch_of({})
        loss_fn = cpo.FusedLinearCPOLoss()

        def run(hidden, weight, bias):
            logps = cpo.linear_token_logps(hidden, weight, batch.labels, bias, vocab_shards=shards)
            given = {"ref_logps": batch.ref_logps, "vocab_shards": shards}
            return loss_fn(hidden, weight, batch.labels, bias, **given).loss + (logps * UPSTREAM).sum()

        torch._dynamo.reset()
        losses = run(*batch.leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*batch.leaves)
        assert torch.equal(*losses)
        for seen, want in zip(*(torch.autograd.grad(loss, batch.leaves) for loss in losses), strict=True):
            assert torch.equal(seen, want)
    finally:
        dist.destroy_process_group()
