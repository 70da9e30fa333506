"""A batch plan made on the host: the same results, nothing waits for the device, and another batch is refused."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cpo_kernels as cpo
from cpo_kernels import checks, library
from cpo_kernels.batch_plan import Group, Layout, Tables, linked_groups, pack_groups
from cpo_kernels.head import kto, nll
from cpo_kernels.head import preference as head_preference
from cpo_kernels.head import token_logps as head_token_logps
from cpo_kernels.head.strategy import SumLimit
from tests.losses.test_loss import OBJECTIVES, ROW, ratings
from tests.support.heads import make_batch, relative_error

BUDGETS = {"one_chunk": None, "chunks": 34 * ROW, "two_pass": 3 * ROW}
aten = torch.ops.aten


class NoWaiting(TorchDispatchMode):
    """Raises where the host would need a value, or a size, from the device."""

    forbidden = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.forbidden or (func is aten.index.Tensor and any(t.dtype == torch.bool for t in args[1])):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """Runs the bodies of the head's ops under `NoWaiting`; of all tensors the plan's own host tensor may be read."""

    def watch(op):
        def run(*bundles):
            args, tolist = library.flatten(bundles), torch.Tensor.tolist

            def checked(tensor):
                if not any(tensor is a for a in args if isinstance(a, torch.Tensor)) or tensor.dim() != 1:
                    raise AssertionError("tolist() waits for the device")
                return tolist(tensor)

            with monkeypatch.context() as patch, NoWaiting():
                patch.setattr(torch.Tensor, "tolist", checked)
                return op.build(iter(library.BODIES[op.overload](*args)))

        return run

    monkeypatch.setattr(head_preference, "linear_preference_op", watch(head_preference.linear_preference_op))
    monkeypatch.setattr(head_token_logps, "linear_token_logps_op", watch(head_token_logps.linear_token_logps_op))
    monkeypatch.setattr(nll, "linear_nll_op", watch(nll.linear_nll_op))
    monkeypatch.setattr(kto, "linear_kto_op", watch(kto.linear_kto_op))


def loss_and_grads(loss_fn, batch, train_head, **kwargs):
    weight, bias = (t if train_head else t.detach() for t in (batch.weight, batch.bias))
    out = loss_fn(batch.hidden, weight, batch.labels, bias, **kwargs)
    leaves = batch.leaves if train_head else batch.leaves[:1]
    return [*out, *torch.autograd.grad(out.loss, leaves, torch.tensor(-1.3, dtype=torch.float64))]


def same(seen, want):
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(seen, want, strict=True))


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "orpo", "aot"])
def test_same_bits_with_a_plan(loss_type, budget, train_head):
    batch, rated = make_batch(8), ratings(8)
    batch.labels[5] = -100
    pairs = torch.tensor([[6, 1], [0, 2], [1, 7], [3, 4]])  # two chains of linked pairs, sequence 5 in none
    tensors = {**rated} if loss_type == "orpo" else {**rated, "ref_logps": batch.ref_logps}
    loss_fn = cpo.FusedLinearCPOLoss(OBJECTIVES, loss_type=loss_type, memory_budget=BUDGETS[budget])
    plan = loss_fn.plan(batch.labels, 101, torch.float64, pairs=pairs, device="cpu", **rated)
    want = loss_and_grads(loss_fn, batch, train_head, pairs=pairs, **tensors)
    assert same(loss_and_grads(loss_fn, batch, train_head, plan=plan, **tensors), want)


def test_the_budgets_above_are_three_strategies():
    def layout(budget):
        return cpo.FusedLinearCPOLoss(memory_budget=budget).plan(make_batch(8).labels, 101, torch.float64, device="cpu")

    plans = {name: layout(budget).layout for name, budget in BUDGETS.items()}
    assert [p.strategy for p in plans.values()] == ["pairs", "pairs", "two_pass"]
    assert len(plans["one_chunk"].chunks) == 1 and len(plans["chunks"].chunks) > 1


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shared", [False, True], ids=["ref_logps", "ref_hidden"])
def test_nothing_waits_for_the_device(watched, budget, shared, train_head):
    batch, rated = make_batch(8), ratings(8)
    loss_fn = cpo.FusedLinearCPOLoss(OBJECTIVES, memory_budget=BUDGETS[budget])
    ref = {"ref_hidden": batch.hidden.detach() + 1} if shared else {"ref_logps": batch.ref_logps}
    plan = loss_fn.plan(batch.labels, 101, torch.float64, device="cpu", **rated)
    loss_and_grads(loss_fn, batch, train_head, plan=plan, **rated, **ref)
    with pytest.raises(AssertionError, match="waits for the device"):
        loss_and_grads(loss_fn, batch, train_head, **rated, **ref)


def test_the_supervised_loss_waits_for_nothing_either(watched):
    batch = make_batch()
    index = (batch.labels.flatten() != -100).nonzero().squeeze(1)
    for weight in (batch.weight, batch.weight.detach()):
        cpo.linear_nll(batch.hidden, weight, batch.labels, index=index)
        cpo.linear_token_logps(batch.hidden, weight, batch.labels, index=index)
        with pytest.raises(AssertionError, match="waits for the device"):
            cpo.linear_nll(batch.hidden, weight, batch.labels)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shared", [False, True], ids=["ref_logps", "ref_hidden"])
def test_kto_waits_for_nothing_but_the_lengths(watched, budget, shared, monkeypatch):
    batch = make_batch(8)
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tolist(tensor)) or read[-1])
    ref = {"ref_hidden": batch.hidden.detach() + 1} if shared else {"ref_logps": batch.ref_logps}
    given = {"desirable": torch.arange(8) > 2, "kl": torch.tensor(0.2), **ref}
    loss_fn = cpo.FusedLinearKTOLoss(memory_budget=BUDGETS[budget])
    loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, **given).loss.backward()
    assert read == [tolist(batch.lengths())]


class Waits(TorchDispatchMode):
    """Runs the bodies of our ops and notes those in which the host waits."""

    def __init__(self):
        super().__init__()
        self.running, self.ran, self.waited = [], set(), set()

    def note(self):
        self.waited |= set(self.running)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in library.BODIES:
            self.ran.add(func)
            self.running.append(func)
            with self:
                result = library.BODIES[func](*args)
            self.running.pop()
            return result
        if func in NoWaiting.forbidden:
            self.note()
        return func(*args, **(kwargs or {}))


def test_ops_that_wait_are_left_out_of_cuda_graphs(monkeypatch):
    """torch.compile(mode="reduce-overhead") captures what is not tagged: without a plan that failed in our ops."""
    monkeypatch.setattr(checks, "may_read", lambda tensor: False)  # as on a GPU
    batch, rated, mode = make_batch(8), ratings(8), Waits()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: mode.note() or tolist(tensor))
    leaves, labels, ref = (batch.hidden, batch.weight, batch.labels), batch.labels, {"ref_logps": batch.ref_logps}
    with mode:
        cpo.linear_nll(*leaves).backward()
        logps = cpo.linear_token_logps(*leaves)
        logps.sum().backward(retain_graph=True)
        cpo.token_logps(batch.hidden @ batch.weight.T, labels).sum().backward()
        logps = cpo.sequence_logps(logps.flatten(), torch.arange(9) * labels.shape[1])
        for loss_type, more in (("sigmoid", {}), ("aot", {}), ("sigmoid", {"ld_alpha": 0.5})):
            cpo.FusedLinearCPOLoss(OBJECTIVES, loss_type=loss_type, **more)(*leaves, **rated, **ref).loss.backward()
        cpo.FusedLinearKTOLoss()(*leaves, desirable=logps > logps.mean(), kl=0.0, **ref).loss.backward()
        cpo.CPOLoss(OBJECTIVES)(logps, **rated, **ref).loss.backward()
    assert mode.ran == set(library.BODIES)
    assert (
        mode.waited == {op for op in library.BODIES if torch.Tag.cudagraph_unsafe in op.tags} and len(mode.waited) == 5
    )


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_all_positions_serve_other_labels(budget, train_head):
    """One plan, as a CUDA graph would replay it, for batches whose labelled positions differ."""
    loss_fn = cpo.FusedLinearCPOLoss(loss_type=["sigmoid", "sft"], memory_budget=BUDGETS[budget])
    plan = loss_fn.plan(make_batch(8).labels, 101, torch.float64, device="cpu", all_positions=True)
    plain = cpo.FusedLinearCPOLoss(loss_type=["sigmoid", "sft"])
    for seed in (1, 2):
        batch = make_batch(8, seed=seed)
        batch.labels[seed] = -100
        seen = loss_and_grads(loss_fn, batch, train_head, plan=plan, ref_logps=batch.ref_logps)
        want = loss_and_grads(plain, batch, train_head, ref_logps=batch.ref_logps)
        for a, b in zip(seen, want, strict=True):
            finite = b.double().isfinite()
            assert relative_error(a[finite], b[finite]) < 1e-11
    index = torch.arange(batch.labels.numel())
    for weights in (None, torch.rand(batch.labels.shape, dtype=torch.float64)):
        given = (batch.hidden, batch.weight, batch.labels, batch.bias)
        seen = cpo.linear_nll(*given, token_weights=weights, index=index)
        assert relative_error(seen, cpo.linear_nll(*given, token_weights=weights)) < 1e-12


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.4}, {"use_weighting": True}], ids=["plain", "ld", "wpo"])
def test_a_reference_with_the_same_head_shares_the_product(monkeypatch, budget, train_head, options):
    batch = make_batch(8, bias=False)
    ref = make_batch(8, bias=False, seed=5)
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=BUDGETS[budget], **options)
    weight = batch.weight if train_head else batch.weight.detach()
    twin = batch.weight.detach().clone()  # another tensor: two products
    want = loss_fn(batch.hidden, weight, batch.labels, ref_hidden=ref.hidden.detach(), ref_weight=twin)
    want_grads = torch.autograd.grad(want.loss, batch.leaves[: 1 + train_head])
    cells, mm = [], torch.mm

    def counting(a, b, **kwargs):
        cells.append(a.shape[0] * b.shape[1] if a.shape[1] == 24 == b.shape[0] else 0)  # X W^T, or some columns of it
        return mm(a, b, **kwargs)

    monkeypatch.setattr(head_token_logps.torch, "mm", counting)
    seen = loss_fn(batch.hidden, weight, batch.labels, ref_hidden=ref.hidden.detach())
    grads = torch.autograd.grad(seen.loss, batch.leaves[: 1 + train_head])
    assert (
        relative_error(seen.loss, want.loss) < 1e-12
        and relative_error(seen.chosen_rewards, want.chosen_rewards) < 1e-11
    )
    assert all(relative_error(g, w) < 1e-11 for g, w in zip(grads, want_grads, strict=True))
    labelled = int(batch.lengths().sum())
    again = labelled if train_head and budget == "two_pass" else 0  # makes the policy's logits a second time
    assert sum(cells) == (2 * labelled + again) * 101
    if budget == "one_chunk":
        assert max(cells) == 2 * labelled * 101  # one product for both
    with torch.no_grad():
        assert (
            relative_error(loss_fn(batch.hidden, weight, batch.labels, ref_hidden=ref.hidden).loss, want.loss) < 1e-12
        )


@pytest.mark.parametrize("seed", range(20))
def test_chunks_of_groups_are_as_even_as_their_order_allows(seed):
    """As many chunks as if each were filled to the limit, and none smaller by a limit one lower."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 30, (int(torch.randint(0, 40, (), generator=g)),), generator=g).tolist()
    limit = int(torch.randint(1, 80, (), generator=g))

    def count(limit):
        chunks, room = 0, -1
        for size in sizes:
            if not chunks or size > room:
                chunks, room = chunks + 1, limit
            room -= size
        return chunks

    packed = pack_groups([Group([i], [i], size) for i, size in enumerate(sizes)], limit)
    assert [s for c in packed for s in c.sequences] == [p for c in packed for p in c.pairs] == [*range(len(sizes))]
    assert [c.num_rows for c in packed] == [sum(sizes[s] for s in c.sequences) for c in packed]
    several = [c.num_rows for c in packed if len(c.sequences) > 1]
    assert len(packed) == count(limit) and all(rows <= limit for rows in several)
    most = max((c.num_rows for c in packed if c.num_rows <= limit), default=0)
    assert most in (0, *sizes) or count(most - 1) > len(packed)


def test_layout_orders_whole_groups():
    lengths, pairs = [3, 5, 0, 2, 4], [(3, 0), (1, 4), (0, 3)]
    assert [g.sequences for g in linked_groups(pairs, lengths)] == [[0, 3], [1, 4], [2]]
    layout = Layout(lengths, pairs, 9, False, False, SumLimit(9, 0))
    assert layout.strategy == "pairs" and [g.sequences for g in layout.chunks] == [[0, 3], [1, 4, 2]]
    tables = Tables(layout, layout.tables())
    first, second = layout.parts
    assert tables.order.tolist() == [0, 1, 2, 8, 9, 3, 4, 5, 6, 7, 10, 11, 12, 13]
    assert tables.segments[first.rows].tolist() == [0, 0, 0, 1, 1]
    assert tables.offsets(second, 1).tolist() == [0, 5, 9, 9] and tables.offsets(first, 0).tolist() == [0, 3, 5]
    assert tables.local_pairs[first.pairs].tolist() == [[1, 0], [0, 1]]
    assert tables.local_pairs[second.pairs].tolist() == [[0, 1]]
    assert tables.sequences[tables.slots].tolist() == [0, 1, 2, 3, 4]
    again = Layout.unpack(layout.pack())
    assert again == layout and torch.equal(again.tables(), layout.tables())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(vocab_size=113), "the plan was made for chunks of 8 rows, this head takes 9.* device 'cpu'"),
        (dict(labels=torch.zeros(6, 9, dtype=torch.int64)), "made for 6 sequences in 54 positions, got 8 in 72"),
        (dict(labels=torch.zeros(8, 8, dtype=torch.int64)), "made for 8 sequences in 64 positions, got 8 in 72"),
        (dict(dtype=torch.float32), "the plan was made for chunks of 16 rows, this head takes 9"),
    ],
)
def test_a_plan_for_another_batch_is_refused(change, message):
    batch = make_batch(8)
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=9 * ROW)
    given = {"labels": batch.labels, "vocab_size": 101, "dtype": torch.float64, "device": "cpu", **change}
    plan = loss_fn.plan(**given)
    with pytest.raises(ValueError, match=message):
        loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps, plan=plan)


@pytest.mark.parametrize("train_head", [True, False])
def test_a_plan_of_other_labels_is_refused(train_head):
    """Masked again after the collator: as many positions, other labelled ones, or as many labelled and others."""
    batch = make_batch(8)
    weight = batch.weight if train_head else batch.weight.detach()
    loss_fn = cpo.FusedLinearCPOLoss()
    plan = loss_fn.plan(batch.labels, 101, torch.float64, device="cpu")
    fewer = batch.labels.clone()
    fewer[2, -1] = -100
    moved = batch.labels.roll(1, 1)
    for labels in (fewer, moved):
        with pytest.raises(ValueError, match="make the plan from the labels of this call"):
            loss_fn(batch.hidden, weight, labels, ref_logps=batch.ref_logps, plan=plan)
    every = loss_fn.plan(batch.labels, 101, torch.float64, device="cpu", all_positions=True)
    loss_fn(batch.hidden, weight, fewer, ref_logps=batch.ref_logps, plan=every)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=[[1]]), "labels must be a tensor, got list"),
        (dict(labels=torch.zeros(8, 9, dtype=torch.int32)), "labels must be int64, got torch.int32"),
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (dict(dtype="bfloat16"), "dtype must be one of torch.float32, .* got 'bfloat16'"),
        (dict(pairs=torch.tensor([[0, 9]])), r"pair 0 is \[0, 9\]: give two different sequences in \[0, 8\)"),
        (dict(pairs=torch.tensor([[0, 9]]), all_positions=True), r"pair 0 is \[0, 9\]"),
        (dict(pairs=torch.tensor([[0.0, 1.0]])), r"pairs must be int64 of shape \[P, 2\]"),
        (dict(conditions=torch.zeros(4, 2, device="meta")), "made from CPU tensors, got conditions on meta"),
    ],
)
def test_bad_input_of_a_plan(change, message):
    given = {"labels": make_batch(8).labels, "vocab_size": 101, "dtype": torch.float64, "device": "cpu", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        cpo.FusedLinearCPOLoss().plan(**given)


def test_pairs_come_from_the_plan():
    batch = make_batch(8)
    loss_fn = cpo.FusedLinearCPOLoss()
    plan = loss_fn.plan(batch.labels, 101, torch.float64, device="cpu")
    with pytest.raises(ValueError, match="give pairs or plan, not both"):
        loss_fn(batch.hidden, batch.weight, batch.labels, pairs=plan.pairs, plan=plan, ref_logps=batch.ref_logps)
    with pytest.raises(ValueError, match="index must be int64 of shape"):
        cpo.linear_nll(batch.hidden, batch.weight, batch.labels, index=torch.zeros(3))
