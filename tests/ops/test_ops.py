"""The op table: torch.library's own checks, logits-level autograd, torch.compile and the choice of a backend."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

import cpo_kernels as cpo
from cpo_kernels import checks, library, reference
from cpo_kernels.backends import dispatch
from cpo_kernels.backends.vocab_parallel import Backend
from cpo_kernels.batch_plan import PlanTensors
from cpo_kernels.head import kto, nll
from cpo_kernels.head import preference as head_preference
from cpo_kernels.head import token_logps as head_token_logps
from cpo_kernels.head.inputs import Execution, HeadTensors, Needs
from cpo_kernels.ops import preference, sequence_logps
from cpo_kernels.ops.token_logps import HeadOptions, token_logps_backward_op, token_logps_op
from cpo_kernels.reference.terms import OPTION_DEFAULTS
from tests.support.heads import EVERY_BACKEND, limits_of, make_batch, relative_error


def linear_args(batch):
    bias = batch.weight.new_empty(0) if batch.bias is None else batch.bias
    hidden = batch.hidden.detach().reshape(-1, batch.hidden.shape[-1])
    return HeadTensors(hidden, batch.weight.detach(), bias.detach(), batch.labels.reshape(-1))


def preference_args(batch, dtype):
    lengths, empty64 = batch.lengths(), torch.empty(0, dtype=torch.float64)
    pairs = torch.tensor([[0, 2], [1, 3]])
    options = [float(v) for v in OPTION_DEFAULTS.values()]
    return preference.PreferenceArgs(
        batch.ref_logps.to(dtype), lengths, pairs, empty64, empty64, empty64, empty64, empty64, empty64,
        [0, 13], [1.0, 0.5], options, -1.0, -1.0,
    )  # fmt: skip


def run(impl, row_limit):
    return Execution(limits_of(row_limit), Backend.of(impl))


def op_samples(impl):
    """(op, args) of every functional op."""
    batch = make_batch(dtype=torch.float32)
    tensors = linear_args(batch)
    hidden, weight, _, labels = tensors
    logits, options = hidden @ weight.t(), HeadOptions(-100, 1.0, 0.0, 101)
    logp, lse, _ = token_logps_op(logits, labels, options, False, impl)
    cu_seqlens = torch.arange(5) * 9
    empty, none, needs, execution = logp.new_empty(0), labels.new_empty(0), Needs(True, True, True), partial(run, impl)
    yield token_logps_op, (logits, labels, options, True, impl)
    yield token_logps_backward_op, (logits, labels, lse, torch.randn_like(lse), torch.randn(2, len(lse)), options, impl)
    yield sequence_logps.sequence_logps_op, (logp, cu_seqlens, empty, True, impl)
    yield preference.preference_op, (torch.randn(4), *preference_args(batch, torch.float32), impl)
    for filtered in (False, True):
        where = execution(16)._replace(filter_eps=0.05 * filtered, filter_head_grad=filtered)
        args = head_token_logps.TokenArgs(none, hidden + 1, options, True, True, True, 0, filtered, where)
        yield head_token_logps.linear_token_logps_op, (tensors, args)
        out = head_token_logps.linear_token_logps_op(tensors, args)
        grad = torch.randn_like(lse)
        wanted = needs._replace(dx=not filtered)  # where dX was computed in the forward pass
        entropies = empty if filtered else torch.randn(2, len(lse))
        back = head_token_logps.BackwardArgs(
            none, lse, empty, grad, entropies, options, wanted, out.live, filtered, where
        )
        yield head_token_logps.linear_token_logps_backward_op, (tensors, back)
        yield nll.linear_nll_op, (tensors, nll.NLLArgs(none, empty, options, -1.0, needs, where))
    for limit in (1000, 4):
        loss, plan = preference_args(batch, torch.float32), PlanTensors(none, none, none)
        args = (empty, empty, loss, True, False, False, options, needs, plan, execution(limit))
        yield head_preference.linear_preference_op, (tensors, head_preference.LinearPreferenceArgs(*args))
    unpaired = kto.KTOArgs(
        batch.ref_logps.double(), torch.tensor([True, False, True, False]), empty.new_zeros((), dtype=torch.float64),
        0.1, 1.3, 0.6,
    )  # fmt: skip
    for limit in (1000, 4):
        args = kto.LinearKTOArgs(unpaired, batch.lengths(), empty, True, -1.0, options, needs, execution(limit))
        yield kto.linear_kto_op, (tensors, args)
    rounded = tensors._replace(**{name: getattr(tensors, name).bfloat16() for name in ("hidden", "weight", "bias")})
    where = execution(16)._replace(filter_eps=0.05)  # dX may wait in float32
    args = head_token_logps.TokenArgs(none, rounded.hidden[:0, 0], options, False, True, True, 0, False, where)
    yield head_token_logps.linear_token_logps_op, (rounded, args)
    even = rounded._replace(hidden=rounded.hidden.repeat(1, 2), weight=rounded.weight.repeat(1, 2))
    args = args._replace(
        want_dx=False, trains_head=False, options=options._replace(softcap=0.0), execution=execution(16)
    )
    yield head_token_logps.linear_token_logps_op, (even, args)  # its logits need not be stored


@pytest.mark.parametrize("impl", EVERY_BACKEND)
@pytest.mark.parametrize("index", range(16))
def test_opcheck(index, impl):
    op, args = list(op_samples(impl))[index]
    opcheck(op.overload, library.flatten(args))


@pytest.mark.parametrize("index", range(16))
def test_a_fake_has_the_bundles_of_the_op(index):
    """Arguments and results are the same NamedTuples through the op, its fake and torch.compile."""
    op, args = list(op_samples("cpu"))[index]
    torch._dynamo.reset()
    out = op(*args)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        fake = op(*pytree.tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), args))
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True, backend="eager")(*args)

    def sizes(t):
        """None where the values decide: the live sets of a filtered head."""
        return [n if isinstance(n, int) else None for n in t.shape]

    described = [pytree.tree_map(lambda t: (t.shape, t.dtype), made) for made in (out, compiled)]
    assert described[0] == described[1]
    for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(fake), strict=True):
        assert a.dtype == b.dtype and all(n in (None, m) for n, m in zip(sizes(b), a.shape, strict=True))
    structure = pytree.tree_structure(out)  # the classes of the NamedTuples are part of it
    assert structure == pytree.tree_structure(fake) == pytree.tree_structure(compiled)


def test_every_backend_has_the_five_kernels():
    for name in library.SCHEMAS:
        assert callable(getattr(reference, name)) and callable(getattr(torch.ops.cpo_kernels, name))


@pytest.mark.parametrize("impl", EVERY_BACKEND)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0,), (2, 0, 3)])
def test_token_logps_of_any_leading_shape(impl, shape):
    logits = torch.randn(*shape, 33, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(33, shape)
    upstream = torch.randn(shape, dtype=torch.float64)
    seen = cpo.token_logps(logits, labels, softcap=2.0, scale=0.5, impl=impl)
    want = reference.token_logps(logits, labels, softcap=2.0, scale=0.5)
    assert seen.shape == shape and relative_error(seen, want) < 1e-12
    (got,), (truth,) = (torch.autograd.grad(x, logits, upstream) for x in (seen, want))
    assert relative_error(got, truth) < 1e-12


@pytest.mark.parametrize("impl", EVERY_BACKEND)
def test_token_logps_gradcheck_and_saved_logits(impl):
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 8, 3])
    torch.autograd.gradcheck(lambda x: cpo.token_logps(x, labels, vocab_size=None, softcap=3.0, impl=impl), logits)
    before = logits.detach().clone()
    logps = cpo.token_logps(logits, labels, impl=impl)
    logps.sum().backward(retain_graph=True)
    first = logits.grad.clone()
    logps.sum().backward()
    assert torch.equal(logits.detach(), before) and torch.equal(logits.grad, 2 * first)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(cpo.token_logps(logits, labels, impl=impl).sum(), logits, create_graph=True)


@pytest.mark.parametrize("impl", EVERY_BACKEND)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_the_entropy(impl, softcap):
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 6, 3])

    def run(x):
        logps, extras = cpo.token_logps(x, labels, softcap=softcap, scale=1.5, vocab_size=7, extras=True, impl=impl)
        return logps, extras.entropy

    fast = impl == "triton"  # in its interpreter along random directions, not for each element
    torch.autograd.gradcheck(run, logits, fast_mode=fast)
    torch.autograd.gradcheck(lambda x: run(x)[1], logits, fast_mode=fast)
    extras = cpo.token_logps(logits, labels, extras=True, impl=impl)[1]
    assert not any(t.requires_grad for t in extras[1:])


def test_transposed_logits():
    logits = torch.randn(50, 6).t().requires_grad_()
    labels = torch.randint(50, (6,))
    want = torch.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
    assert relative_error(cpo.token_logps(logits, labels), want) < 1e-6


@pytest.mark.parametrize("train_head", [True, False])
def test_compile_without_graph_breaks_or_recompiles(train_head):
    """aot_eager traces what inductor would; lengths change from call to call."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    objectives = [cpo.Objective("helpfulness", 1, 5)]
    loss_fn = cpo.FusedLinearCPOLoss(objectives, loss_type=["sigmoid", "sft"])
    kto_fn = cpo.FusedLinearKTOLoss()

    def run(hidden, weight, labels, ref_logps, scores):
        out = loss_fn(hidden, weight, labels, ref_logps=ref_logps, scores=scores)
        logps, _ = cpo.linear_token_logps(hidden, weight, labels, extras=True)
        kl = kto_fn.kl(hidden, weight, labels, ref_logps=ref_logps)
        unpaired = kto_fn(hidden, weight, labels, desirable=scores[:, 0] > 3, kl=kl, ref_logps=ref_logps)
        return out.loss + cpo.linear_nll(hidden, weight, labels) + logps.mean() + unpaired.loss, out.margin

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (9, 12, 17):
        batch = make_batch(4, length, dtype=torch.float32, bias=False)
        weight = batch.weight if train_head else batch.weight.detach()
        leaves = batch.leaves if train_head else batch.leaves[:1]
        args = (batch.hidden, weight, batch.labels, batch.ref_logps, 1 + 4 * torch.rand(4, 1))
        (seen, margin), (want, want_margin) = compiled(*args), run(*args)
        assert torch.equal(seen, want) and torch.equal(margin, want_margin)
        grads = [torch.autograd.grad(x * -1.3, leaves) for x in (seen, want)]
        if train_head:
            assert all(torch.equal(g, w) for g, w in zip(*grads, strict=True))
        else:  # compiled, extras make the logits again in backward: their entropy may have a gradient
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_a_backend_by_name_never_falls_back(monkeypatch):
    logits, labels = torch.randn(2, 5), torch.tensor([1, 2])
    monkeypatch.setitem(dispatch._MISSING, "cuda", "this installation has no CUDA C++ extension")
    with pytest.raises(RuntimeError, match="impl='cuda' is not available: .*no CUDA C\\+\\+ extension"):
        cpo.token_logps(logits, labels, impl="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="impl='triton' takes GPU tensors.*got a tensor on cpu"):
        cpo.token_logps(logits, labels, impl="triton")
    monkeypatch.setitem(dispatch._MISSING, "triton", "no such package")
    with pytest.raises(RuntimeError, match="impl='triton' is not available: no such package"):
        cpo.token_logps(logits, labels, impl="triton")
    with pytest.raises(ValueError, match="got 'quick'"):
        cpo.token_logps(logits, labels, impl="quick")
    with pytest.raises(ValueError, match="takes CPU tensors, got a tensor on meta"):
        cpo.token_logps(logits.to("meta"), labels.to("meta"), impl="cpu")


@pytest.mark.parametrize("capability, fused", [((8, 0), "triton"), ((9, 0), "cuda"), ((10, 0), "triton")])
def test_auto_on_a_gpu_takes_each_op_from_the_backend_of_the_table(monkeypatch, capability, fused):
    """As far as a CPU shows it: the device is played, and what would run is looked at."""
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_load_extension", lambda name: "")
    monkeypatch.setitem(dispatch._MISSING, "cuda", "this installation has no CUDA C++ extension")
    dispatch._preferred_kernels.cache_clear()
    triton = dispatch.kernels("auto", gpu)
    assert triton is dispatch.kernels("triton", gpu)
    monkeypatch.setitem(dispatch._MISSING, "cuda", "")
    chosen = dispatch.kernels("auto", gpu)
    for op in library.SCHEMAS:
        wanted = fused if op == "token_logps_fused_" else "triton"
        assert getattr(chosen, op) is getattr(dispatch.kernels(wanted, gpu), op)
    assert dispatch.kernels("triton", gpu) is triton  # by name there is no mixture
    monkeypatch.setattr(dispatch, "_load_extension", lambda name: "built for another machine")
    dispatch._preferred_kernels.cache_clear()
    assert dispatch.kernels("auto", gpu) is triton
    dispatch._preferred_kernels.cache_clear()


def test_without_the_extension_the_reference_takes_over_and_says_so_once():
    script = """
import sys, warnings
sys.modules["cpo_kernels._C"] = None
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import cpo_kernels as cpo, torch
    logps = cpo.token_logps(torch.zeros(1, 4), torch.tensor([1]))
assert [w.category for w in seen if "cpo_kernels runs on" in str(w.message)] == [RuntimeWarning], seen
assert abs(logps.item() + 1.3862944) < 1e-6
try:
    cpo.token_logps(torch.zeros(1, 4), torch.tensor([1]), impl="cpu")
except RuntimeError as error:
    assert "impl='cpu' is not available" in str(error)
else:
    raise SystemExit("impl='cpu' fell back")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_import_needs_only_torch():
    script = """
import sys
import cpo_kernels
cpo_kernels.FusedLinearCPOLoss  # torch._dynamo alone would take longer than torch without it
heavy = {"transformers", "accelerate", "triton", "matplotlib", "yaml", "trl", "datasets", "torch._dynamo"}
extra = heavy & set(sys.modules)
raise SystemExit(f"import cpo_kernels loads {extra}" if extra else 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels": torch.tensor([1, 5])}, "5"),
        ({"labels": torch.tensor([1, -1])}, "-1"),
        ({"labels": torch.tensor([1, 2], dtype=torch.int32)}, "labels must be int64, got torch.int32"),
        ({"labels": torch.tensor([1])}, r"shape \(2,\) to match logits, got \(1,\)"),
        ({"logits": torch.zeros(2, 5).int()}, "logits must be float32.*got torch.int32"),
        ({"logits": torch.zeros(2, 0)}, r"V >= 1, got \(2, 0\)"),
    ],
)
@pytest.mark.parametrize("impl", EVERY_BACKEND)
def test_misuse_names_the_value(kwargs, message, impl):
    args = {"logits": torch.zeros(2, 5), "labels": torch.tensor([1, 2]), "impl": impl, **kwargs}
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        cpo.token_logps(**args)


def test_a_label_out_of_range_is_nan_without_the_check(monkeypatch):
    """As on a GPU, where the check would make the host wait."""
    monkeypatch.setattr(checks, "may_read", lambda tensor: False)
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([1, 5, -1])
    logps = cpo.token_logps(logits, labels, impl="triton")
    logps.nansum().backward()
    assert logps.isnan().tolist() == [False, True, True]
    (want,) = torch.autograd.grad(cpo.token_logps(logits[:1], labels[:1], impl="reference").sum(), logits)
    assert relative_error(logits.grad[0], want[0]) < 1e-6


def test_cu_seqlens_are_checked():
    for offsets, message in (
        ([0, 2], "number of tokens, 3"),
        ([1, 3], "rise from 0"),
        ([0, 3, 2, 3], r"\[0, 3, 2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cpo.sequence_logps(torch.zeros(3), torch.tensor(offsets))
    with pytest.raises(ValueError, match="got torch.float16"):
        cpo.sequence_logps(torch.zeros(3).half(), torch.tensor([0, 3]))
