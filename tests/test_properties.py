"""The public functions against the oracle over random shapes, dtypes, layouts, options and conditions.

A short run in CI, the same examples every time; a night's run with CPO_KERNELS_EXAMPLES=5000.
"""

import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cpo_kernels as cpo
from cpo_kernels import LOSS_TYPES, reference

EXAMPLES = int(os.environ.get("CPO_KERNELS_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@st.composite
def heads(draw, max_rows=9):
    """(tensors, options of the head, and what of it trains); some or all rows are ignored."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, hidden, vocab = (draw(st.integers(low, high)) for low, high in ((0, max_rows), (1, 17), (1, 67)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    # Values that float32 holds: the oracle sees the same numbers.
    x, w, b = (torch.randn(*shape, generator=g) for shape in ((rows, hidden), (vocab, hidden), (vocab,)))
    vocab_size = draw(st.one_of(st.none(), st.integers(1, vocab)))
    ignore_index = draw(st.sampled_from([-100, -1, 0, 3]))
    labels = torch.randint(vocab_size or vocab, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = ignore_index
    width = vocab * torch.finfo(dtype).bits // 8
    head = {
        "ignore_index": ignore_index,
        "softcap": draw(st.sampled_from([None, 5.0, 30.0])),
        "scale": draw(st.sampled_from([1.0, 0.0625, 2.5])),
        "vocab_size": vocab_size,
        "memory_budget": draw(st.sampled_from([None, 1, 3 * width])),
        "impl": draw(st.sampled_from(["cpu", "reference"])),
    }
    train = draw(st.sampled_from([(1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1), (0, 0, 0)]))
    tensors = [t.to(dtype) for t in (x * spread, w, b)]
    if not draw(st.booleans()):
        tensors[2] = None
    return tensors, labels, head, train, g


def leaves_of(tensors, train, dtype=None):
    """Copies of (hidden, weight, bias) with their requires_grad."""
    return [
        None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_(bool(r))
        for t, r in zip(tensors, train, strict=True)
    ]


def gradients(value, leaves, upstream):
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return torch.autograd.grad(value, wanted, upstream.to(value.dtype)) if wanted else ()


def assert_same(seen, truth, tolerance, slack=0.0):
    """Within tolerance * the largest value of each, + slack."""
    for s, t in zip(seen, truth, strict=True):
        assert s.shape == t.shape
        atol = tolerance * float(t.detach().abs().max()) + slack if t.numel() else 0.0
        torch.testing.assert_close(s.detach().double(), t.detach().double(), rtol=0, atol=atol)


def rounding(tensors, head, upstream):
    """What exp(z - lse) may be off by in a gradient that is near 0 by cancellation: eps * |z| * scale * |x| or |w|."""
    x, w, b = (None if t is None else t.double() for t in tensors)
    if not len(x):
        return 0.0
    z = head["scale"] * torch.nn.functional.linear(x.abs(), w.abs(), None if b is None else b.abs()).max()
    largest = max(1.0, float(x.abs().max()), float(w.abs().max()))
    return float(torch.finfo(tensors[0].dtype).eps * z * head["scale"] * largest * upstream.abs().sum())


def oracle(tensors, labels, head, train):
    """(log-probs, leaves) in float64."""
    leaves = leaves_of(tensors, train, torch.float64)
    numbers = {name: head[name] for name in ("ignore_index", "softcap", "scale", "vocab_size")}
    return reference.linear_token_logps(leaves[0], leaves[1], labels, leaves[2], **numbers), leaves


@SETTINGS
@given(heads(), st.booleans())
def test_token_logps(case, with_index):
    tensors, labels, head, train, g = case
    truth, true_leaves = oracle(tensors, labels, head, train)
    upstream = torch.randn(labels.shape, generator=g, dtype=torch.float64)
    leaves = leaves_of(tensors, train)
    index = (labels != head["ignore_index"]).nonzero().squeeze(1) if with_index else None
    logps = cpo.linear_token_logps(leaves[0], leaves[1], labels, leaves[2], index=index, **head)
    tolerance = TOLERANCE[tensors[0].dtype]
    assert logps.dtype == tensors[0].dtype and not logps[labels == head["ignore_index"]].any()
    want = gradients(truth, true_leaves, upstream) if truth.requires_grad else ()
    got = gradients(logps, leaves, upstream) if logps.requires_grad else ()
    slack = rounding(tensors, head, upstream)
    assert_same((logps, *got), (truth, *want), tolerance, slack)


@SETTINGS
@given(heads())
def test_nll_with_token_weights(case):
    tensors, labels, head, train, g = case
    weights = torch.randn(labels.shape, generator=g).double()
    truth, true_leaves = oracle(tensors, labels, head, train)
    truth = -(truth * weights).sum() / max(1, int((labels != head["ignore_index"]).sum()))
    leaves = leaves_of(tensors, train)
    loss = cpo.linear_nll(leaves[0], leaves[1], labels, leaves[2], token_weights=weights, **head)
    upstream = torch.tensor(-0.7, dtype=torch.float64)
    want = gradients(truth, true_leaves, upstream) if any(train[:2]) else ()
    got = gradients(loss, leaves, upstream) if any(train[:2]) else ()
    slack = rounding(tensors, head, weights)  # weights of both signs cancel
    assert_same((loss, *got), (truth, *want), TOLERANCE[tensors[0].dtype], slack)


@st.composite
def losses(draw, sequences):
    """(options of a loss, its tensors) for so many sequences; combinations that raise are not drawn."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    types = draw(st.lists(st.sampled_from(list(LOSS_TYPES)), min_size=1, max_size=2, unique=True))
    options = {"loss_type": types, "beta": draw(st.sampled_from([0.05, 0.5]))}
    smoothing = draw(st.sampled_from([0.0, 0.1])) if "exo_pair" not in types else 0.1
    wanted = {
        "label_smoothing": smoothing,
        "f_divergence": draw(st.sampled_from(["reverse_kl", "reverse_kl", "forward_kl", "js_divergence"])),
        "use_weighting": draw(st.booleans()),
        "ld_alpha": draw(st.sampled_from([None, None, 0.3])),
        "tau": draw(st.sampled_from([None, 0.7])),
        "margin": draw(st.sampled_from([0.0, 0.4])),
    }
    honoured = set.intersection(*(set(LOSS_TYPES[t].honours) for t in types))
    options |= {name: x for name, x in wanted.items() if name in honoured}
    if "exo_pair" in types:
        options["label_smoothing"] = smoothing
    count = draw(st.integers(0, 4))
    first = torch.randint(sequences, (count,), generator=g)
    step = torch.randint(1, sequences, (count,), generator=g)
    pairs = torch.stack([first, (first + step) % sequences], 1)
    if options.get("ld_alpha") is not None:  # needs disjoint pairs
        pairs = torch.randperm(sequences, generator=g)[: sequences // 2 * 2].view(-1, 2)
    tensors = {"pairs": pairs}
    if any(LOSS_TYPES[t].needs_reference for t in types):
        tensors["ref_logps"] = -10 * torch.rand(sequences, generator=g, dtype=torch.float64)
    if "modpo" in types:
        assume(all("margins" in LOSS_TYPES[t].honours for t in types))
        tensors["margins"] = torch.randn(sequences, generator=g, dtype=torch.float64)
    if "pair_weights" in honoured and draw(st.booleans()):
        tensors["pair_weights"] = torch.rand(len(pairs), generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        size = draw(st.integers(1, 3))
        numbers = st.sampled_from([0.5, 1.0, 2.0])
        objectives = [cpo.Objective(f"o{k}", 1, 5, weight=draw(numbers), strength=draw(numbers)) for k in range(size)]
        scores = torch.randint(1, 6, (sequences, size), generator=g).double()
        conditions = torch.randint(1, 6, (len(pairs), size), generator=g).double()
        scores[torch.rand(scores.shape, generator=g) < 0.2] = float("nan")
        conditions[torch.rand(conditions.shape, generator=g) < 0.3] = float("nan")
        options["objectives"] = objectives
        tensors |= {"scores": scores, "conditions": conditions}
    else:
        options = {name: x for name, x in options.items() if name not in ("tau", "margin")}
    try:
        cpo.LossOptions.of({name: tuple(x) if isinstance(x, list) else x for name, x in options.items()})
    except ValueError:
        assume(False)
    return options, tensors


@SETTINGS
@given(st.data(), heads(max_rows=14))
def test_preference_loss_fused_with_the_head(data, case):
    """Packed sequences, empty ones among them, of random lengths; with a reference of its own log-probs."""
    tensors, labels, head, train, g = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(labels)), min_size=1, max_size=4)))
    offsets = torch.tensor([0, *cuts, len(labels)])
    options, given_tensors = data.draw(losses(len(offsets) - 1))
    dtype, tolerance = tensors[0].dtype, 50 * TOLERANCE[tensors[0].dtype]
    if dtype == torch.float32:  # two float32 values on either side of a kink or an order
        assume(not {"hinge", "aot", "aot_unpaired"} & set(options["loss_type"]))

    truth, true_leaves = oracle(tensors, labels, head, train)
    labelled = labels != head["ignore_index"]
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    lengths = torch.tensor([int(labelled[a:b].sum()) for a, b in spans])
    pairs, weights = given_tensors["pairs"], torch.ones(len(labels), dtype=torch.float64)
    alone = {name: x for name, x in options.items() if name not in ("ld_alpha", "use_weighting")}
    pair_weights = given_tensors.get("pair_weights", torch.ones(len(pairs), dtype=torch.float64))
    if options.get("ld_alpha") is not None:
        for a, b in pairs.tolist():
            for s in (a, b):
                places = labelled[spans[s][0] : spans[s][1]].nonzero().squeeze(1) + spans[s][0]
                weights[places[min(lengths[a], lengths[b]) :]] = options["ld_alpha"]
    if options.get("use_weighting"):
        w, x, b = (None if t is None else t.double() for t in (tensors[1], tensors[0], tensors[2]))
        logits = torch.nn.functional.linear(x, w, b)
        names = ("ignore_index", "softcap", "scale", "vocab_size")
        log_sum_sq = reference.token_extras(logits, labels, **{n: head[n] for n in names})[1]
        aligned = (truth.detach() - log_sum_sq) * labelled
        means = torch.stack([aligned[a:b].sum() for a, b in spans]) / lengths.clamp(min=1)
        pair_weights = pair_weights * means.exp()[pairs].prod(1)
    seq_logps = torch.stack([(truth * weights)[a:b].sum() for a, b in spans])
    weighted = {"pair_weights": pair_weights} if "pair_weights" in given_tensors or options.get("use_weighting") else {}
    want = cpo.preference_loss(seq_logps, lengths=lengths, impl="reference", **alone, **{**given_tensors, **weighted})

    assume(want.losses.numel() == 0 or float(want.losses.detach().abs().max()) < 1e4)  # forward KL may overflow float32

    leaves = leaves_of(tensors, train)
    out = cpo.FusedLinearCPOLoss(**head, **options)(
        leaves[0], leaves[1], labels, leaves[2], cu_seqlens=offsets, **given_tensors
    )
    assert torch.equal(out.order, want.order) and int(out.num_ties) == int(want.num_ties)
    upstream = torch.tensor(-1.3, dtype=torch.float64)
    seen, truth = [out.loss], [want.loss]
    if want.loss.requires_grad:
        upstream = torch.tensor(-1.3, dtype=torch.float64)
        seen += gradients(out.loss, leaves, upstream)
        truth += gradients(want.loss, true_leaves, upstream)
    assert_same((*seen, *out[1:5]), (*truth, *want[1:5]), tolerance, slack=tolerance)  # numbers of order 1 cancel


@SETTINGS
@given(st.data(), heads(max_rows=14))
def test_kto_fused_with_the_head(data, case):
    """Packed sequences, empty ones among them, of random lengths and kinds; reference log-probs or hidden states."""
    tensors, labels, head, train, g = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(labels)), min_size=1, max_size=4)))
    offsets = torch.tensor([0, *cuts, len(labels)])
    count = len(offsets) - 1
    weights = {"beta": data.draw(st.sampled_from([0.05, 0.5])), "desirable_weight": 1.3, "undesirable_weight": 0.4}
    average, shared = data.draw(st.booleans()), data.draw(st.booleans())
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    labelled = labels != head["ignore_index"]

    def sums(logps):
        each = torch.stack([logps[a:b].sum() for a, b in spans])
        return each / torch.tensor([int(labelled[a:b].sum()) for a, b in spans]).clamp(min=1) if average else each

    truth, true_leaves = oracle(tensors, labels, head, train)
    seq_logps = sums(truth)
    if shared:
        near = tensors[0] + 0.1 * torch.randn(tensors[0].shape, generator=g).to(tensors[0].dtype)
        ref, ref_logps = {"ref_hidden": near}, sums(oracle([near, *tensors[1:]], labels, head, train)[0]).detach()
    else:
        ref_logps = seq_logps.detach() + 3 * torch.randn(count, generator=g)
        ref = {"ref_logps": ref_logps}
    given = {"desirable": torch.rand(count, generator=g) < 0.5, "kl": float(torch.rand((), generator=g))}
    want = reference.kto_loss(seq_logps, ref_logps, **given, **weights)
    leaves = leaves_of(tensors, train)
    loss_fn = cpo.FusedLinearKTOLoss(**head, **weights, average_log_prob=average)
    out = loss_fn(leaves[0], leaves[1], labels, leaves[2], cu_seqlens=offsets, **given, **ref)
    upstream, seen, truth = torch.tensor(-1.3, dtype=torch.float64), [out.loss], [want.mean()]
    if want.requires_grad:
        seen += gradients(out.loss, leaves, upstream)
        truth += gradients(want.mean(), true_leaves, upstream)
    tolerance = 50 * TOLERANCE[tensors[0].dtype]
    assert_same((*seen, out.losses, out.seq_logps), (*truth, want, seq_logps), tolerance, slack=tolerance)
