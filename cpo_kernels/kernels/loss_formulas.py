"""Every pairwise loss with its gradient in Triton, in float64: the formulas and clamps of csrc/loss_formulas.h.

L_w, L_l: summed log-probs of the chosen and the rejected response; r = L - ref; n: number of tokens; s(r): score of the
f-divergence (`score`); u: the argument of a logistic loss. Sources of the losses: cpo_kernels/reference/loss_types.py.

Only exp and log come from Triton: float64 versions of log1p, expm1 and the logistic functions would come from
libdevice, which the interpreter and AMD GPUs do not have. Constants that float32 cannot represent are written with
tl.full: inside tl.where Triton would turn a bare one into float32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

MAX_EXPONENT = tl.constexpr(80.0)  # exponents are clamped here, with gradient 0 beyond
MAX_ORPO_LOGP = tl.constexpr(-1e-12)
LOG_2 = tl.constexpr(0.6931471805599453)


class Options(NamedTuple):
    """The options in the order of reference.OPTIONS, float64 scalars; without f_divergence, which `score` takes."""

    beta: Any
    label_smoothing: Any
    tau: Any
    margin: Any
    tie_margin: Any
    f_alpha: Any
    discopop_tau: Any
    simpo_gamma: Any
    alphapo_alpha: Any
    nll_alpha: Any
    modpo_weight: Any


class Pairs(NamedTuple):
    """A block of pairs with known chosen and rejected sides: float64 [BLOCK], nll_scale a scalar."""

    chosen: Any  # L_w
    rejected: Any  # L_l
    chosen_ratio: Any  # r_w
    rejected_ratio: Any
    chosen_score: Any  # Value: s(r_w) and its slope
    rejected_score: Any
    chosen_length: Any  # n, at least 1
    rejected_length: Any
    chosen_margin: Any  # MODPO's w_{-k} . m(y)
    rejected_margin: Any
    beta: Any
    gap: Any  # |Delta R|; infinite without scores
    nll_scale: Any  # divisor of the loss / number of chosen tokens


class Term(NamedTuple):
    loss: Any
    chosen: Any  # dl/dL_w
    rejected: Any  # dl/dL_l


class Value(NamedTuple):
    value: Any
    slope: Any


class Delta(NamedTuple):
    u: Any
    chosen: Any  # du/dL_w
    rejected: Any  # du/dL_l


class Logistic(NamedTuple):
    log_up: Any  # log sigmoid(u)
    log_down: Any  # log sigmoid(-u)
    up: Any  # sigmoid(u)
    down: Any  # sigmoid(-u)


# ------------------------------------------------------------------------------------------------ functions of a number


@triton.jit
def log1p(y):
    """log(1 + y) for y in (-1, 1]: log(u) of the rounded u = 1 + y, plus what the rounding dropped.

    The dropped part c counts c / u; leaving out the division costs |c| |y| <= 1.1e-16 |y|.
    """
    u = 1.0 + y
    return tl.log(u) + (y - (u - 1.0))


@triton.jit
def exp_and_expm1(x):
    """e^x and e^x - 1 for x <= 80: (u - 1) x / log(u) of the rounded u = e^x has no cancellation (Kahan)."""
    u = tl.exp(x)
    difference = u - 1.0
    curved = (difference != 0.0) & (u > 0.0)  # else e^x - 1 is x, or -1, to the last bit
    ratio = x / tl.log(tl.where(curved, u, 2.0))
    return u, tl.where(difference == 0.0, x, tl.where(u == 0.0, -1.0, difference * ratio))


@triton.jit
def logistic(u):
    e = tl.exp(-tl.abs(u))  # in [0, 1]
    rest = log1p(e)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return Logistic(
        tl.where(u < 0.0, u, 0.0) - rest,
        tl.where(u > 0.0, -u, 0.0) - rest,
        tl.where(u >= 0.0, larger, smaller),
        tl.where(u >= 0.0, smaller, larger),
    )


@triton.jit
def score(ratio, f_alpha, F_DIVERGENCE: tl.constexpr):
    """f'(e^r) up to constants that cancel in a pair. reverse_kl: r; forward_kl: 1 - e^-r; js: log 2 + log sigmoid(r);
    alpha: (e^((alpha - 1) r) - 1) / (alpha - 1), which is r at alpha = 1."""
    if F_DIVERGENCE == 1:
        over = -ratio > MAX_EXPONENT
        exp, expm1 = exp_and_expm1(tl.where(over, MAX_EXPONENT, -ratio))
        return Value(-expm1, tl.where(over, 0.0, exp))
    elif F_DIVERGENCE == 2:
        p = logistic(ratio)
        return Value(LOG_2 + p.log_up, p.down)
    elif F_DIVERGENCE == 3:
        a = f_alpha - 1.0
        straight = tl.abs(a) < 1e-6
        a = tl.where(straight, 1.0, a)
        over = a * ratio > MAX_EXPONENT
        exp, expm1 = exp_and_expm1(tl.where(over, MAX_EXPONENT, a * ratio))
        return Value(tl.where(straight, ratio, expm1 / a), tl.where(straight, 1.0, tl.where(over, 0.0, exp)))
    else:
        return Value(ratio, tl.full(ratio.shape, 1.0, tl.float64))


@triton.jit
def log_odds(logp, n):
    """a - log(1 - e^a) of a = L / n < 0, with its slope in L: 1 / (n (1 - e^a))."""
    mean = logp / n
    over = mean > MAX_ORPO_LOGP
    a = tl.where(over, tl.full([], MAX_ORPO_LOGP, tl.float64), mean)
    exp, expm1 = exp_and_expm1(a)
    near = a > -LOG_2
    rest = tl.where(near, -expm1, 1.0 - exp)
    log1mexp = tl.log(rest) + tl.where(near, 0.0, -exp - (rest - 1.0))  # log1p(-e^a) where a is far from 0
    return Value(a - log1mexp, tl.where(over, 0.0, -1.0 / (n * expm1)))


@triton.jit
def alpha_reward(logp, n, alpha):
    """(1 - e^(-alpha L / n)) / alpha, and L / n at alpha = 0, with its slope in L."""
    straight = alpha == 0.0
    a = tl.where(straight, 1.0, alpha)
    exponent = -a * logp / n
    over = exponent > MAX_EXPONENT
    exp, expm1 = exp_and_expm1(tl.where(over, MAX_EXPONENT, exponent))
    slope = tl.where(straight, 1.0, tl.where(over, 0.0, exp)) / n
    return Value(tl.where(straight, logp / n, -expm1 / a), slope)


# ---------------------------------------------------------------------------------------------------- shared by losses


@triton.jit
def smoothed(u, q):
    """-q log sigmoid(u) - (1 - q) log sigmoid(-u), with its slope in u."""
    p = logistic(u)
    value = -q * p.log_up - tl.where(q != 1.0, (1.0 - q) * p.log_down, 0.0)  # 0 * inf at q = 1
    return Value(value, (1.0 - q) * p.up - q * p.down)


@triton.jit
def offset(p, o):
    """margin |gap|"""
    on = o.margin != 0.0
    return tl.where(on, tl.where(on, o.margin, 1.0) * p.gap, 0.0)  # no 0 * inf


@triton.jit
def soft_logistic(u, p, o):
    """`smoothed` of u - margin |gap| with q = sigmoid(|gap| / tau), or 1 - label_smoothing where tau is 0."""
    soft = logistic(p.gap / tl.where(o.tau != 0.0, o.tau, 1.0)).up
    return smoothed(u - offset(p, o), tl.where(o.tau != 0.0, soft, 1.0 - o.label_smoothing))


@triton.jit
def scaled_delta(p):
    """beta (s(r_w) - s(r_l))"""
    won = p.chosen_score
    lost = p.rejected_score
    return Delta(p.beta * (won.value - lost.value), p.beta * won.slope, -p.beta * lost.slope)


@triton.jit
def delta_per_token(p):
    """s(r_w) / n_w - s(r_l) / n_l"""
    won = p.chosen_score
    lost = p.rejected_score
    u = won.value / p.chosen_length - lost.value / p.rejected_length
    return Delta(u, won.slope / p.chosen_length, -lost.slope / p.rejected_length)


@triton.jit
def chain(loss, d, factor):
    """A loss of u = factor * d.u, with its gradient."""
    return Term(loss.value, loss.slope * (factor * d.chosen), loss.slope * (factor * d.rejected))


@triton.jit
def add_nll(term, p, o):
    """+ nll_alpha (-L_w nll_scale)"""
    on = o.nll_alpha != 0.0
    loss = term.loss + tl.where(on, -o.nll_alpha * p.chosen * p.nll_scale, 0.0)
    return Term(loss, term.chosen + tl.where(on, -o.nll_alpha * p.nll_scale, 0.0), term.rejected)


# ---------------------------------------------------------------------------------------------------------- the losses


@triton.jit
def pair_loss(TYPES: tl.constexpr, INDEX: tl.constexpr, p, o):
    """Loss and gradient of a block of pairs. aot and aot_unpaired, which need the whole batch, are `smoothed`."""
    KIND: tl.constexpr = TYPES[INDEX]  # Triton 3.6 rejects a string from a tuple as an argument
    if KIND == "sigmoid":  # -log sigmoid(u), u = beta delta
        d = scaled_delta(p)
        return chain(soft_logistic(d.u, p, o), d, 1.0)

    elif KIND == "hinge":  # relu(1 - (u - margin |gap|))
        d = scaled_delta(p)
        x = 1.0 - (d.u - offset(p, o))
        return chain(Value(tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, -1.0, tl.zeros_like(x))), d, 1.0)

    elif KIND == "ipo":  # (s_w / n_w - s_l / n_l - 1 / (2 beta))^2
        d = delta_per_token(p)
        x = d.u - 1.0 / (2.0 * p.beta)
        return chain(Value(x * x, 2.0 * x), d, 1.0)

    elif KIND == "exo_pair":  # q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps), q = sigmoid(u), eps = label_smoothing
        d = scaled_delta(p)
        q = logistic(d.u)
        log_w = log1p(-o.label_smoothing)
        log_l = tl.log(o.label_smoothing)
        value = q.up * (q.log_up - log_w) + q.down * (q.log_down - log_l)
        return chain(Value(value, q.up * q.down * (d.u - log_w + log_l)), d, 1.0)

    elif KIND == "nca_pair":  # -log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2
        won = logistic(p.beta * p.chosen_ratio)
        lost = logistic(p.beta * p.rejected_ratio)
        value = -won.log_up - 0.5 * (won.log_down + lost.log_down)
        return Term(value, p.beta * (0.5 * won.up - won.down), p.beta * 0.5 * lost.up)

    elif KIND == "robust":  # (-(1 - e) log sigmoid(u) + e log sigmoid(-u)) / (1 - 2 e), e = label_smoothing
        d = scaled_delta(p)
        q = logistic(d.u)
        e = o.label_smoothing
        norm = 1.0 / (1.0 - 2.0 * e)
        value = (-(1.0 - e) * q.log_up + e * q.log_down) * norm
        return chain(Value(value, (-(1.0 - e) * q.down - e * q.up) * norm), d, 1.0)

    elif KIND == "bco_pair":  # -log sigmoid(beta r_w) - log sigmoid(-beta r_l)
        won = logistic(p.beta * p.chosen_ratio)
        lost = logistic(p.beta * p.rejected_ratio)
        return Term(-won.log_up - lost.log_down, -p.beta * won.down, p.beta * lost.up)

    elif KIND == "sppo_hard":  # (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2
        won = p.chosen_ratio - 0.5 / p.beta
        lost = p.rejected_ratio + 0.5 / p.beta
        return Term(won * won + lost * lost, 2.0 * won, 2.0 * lost)

    elif KIND == "apo_zero":  # 1 - sigmoid(beta r_w) + sigmoid(beta r_l)
        won = logistic(p.beta * p.chosen_ratio)
        lost = logistic(p.beta * p.rejected_ratio)
        return Term(won.down + lost.up, -p.beta * won.up * won.down, p.beta * lost.up * lost.down)

    elif KIND == "apo_down":  # sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))
        won = logistic(p.beta * p.chosen_ratio)
        d = logistic(p.beta * p.chosen_ratio - p.beta * p.rejected_ratio)
        slope = p.beta * d.up * d.down
        return Term(won.up + d.down, p.beta * won.up * won.down - slope, slope)

    elif KIND == "discopop":  # -(1 - m) log sigmoid(u) + m e^-u, m = sigmoid(u / discopop_tau); m e^-u is one exp
        d = scaled_delta(p)
        q = logistic(d.u)
        m = logistic(d.u / o.discopop_tau)
        exponential = tl.exp(m.log_up - d.u)
        slope = m.up * m.down / o.discopop_tau * q.log_up - m.down * q.down
        slope += exponential * (m.down / o.discopop_tau - 1.0)
        return chain(Value(-m.down * q.log_up + exponential, slope), d, 1.0)

    elif KIND == "sft":  # -L_w nll_scale: summed and divided by the loss's divisor, the NLL per chosen token
        zero = tl.zeros_like(p.chosen)
        return Term(-p.chosen * p.nll_scale, zero - p.nll_scale, zero)

    elif KIND == "sigmoid_norm":  # -log sigmoid(beta (s_w / n_w - s_l / n_l))
        d = delta_per_token(p)
        return chain(soft_logistic(p.beta * d.u, p, o), d, p.beta)

    elif KIND == "simpo":  # -log sigmoid(beta (L_w / n_w - L_l / n_l) - simpo_gamma)
        u = p.beta * (p.chosen / p.chosen_length - p.rejected / p.rejected_length) - o.simpo_gamma
        loss = soft_logistic(u, p, o)
        return Term(loss.value, loss.slope * p.beta / p.chosen_length, -loss.slope * p.beta / p.rejected_length)

    elif KIND == "orpo":  # -beta log sigmoid(o_w - o_l) + nll_alpha NLL(y_w), o = log_odds(L, n)
        won = log_odds(p.chosen, p.chosen_length)
        lost = log_odds(p.rejected, p.rejected_length)
        q = logistic(won.value - lost.value)
        slope = -p.beta * q.down
        return add_nll(Term(-p.beta * q.log_up, slope * won.slope, -slope * lost.slope), p, o)

    elif KIND == "contrastive_cpo":  # -log sigmoid(beta (L_w - L_l)) + nll_alpha NLL(y_w)
        loss = soft_logistic(p.beta * (p.chosen - p.rejected), p, o)
        return add_nll(Term(loss.value, loss.slope * p.beta, -loss.slope * p.beta), p, o)

    elif KIND == "alphapo":  # -log sigmoid(beta (r_w - r_l) - simpo_gamma), r = alpha_reward(L, n)
        won = alpha_reward(p.chosen, p.chosen_length, o.alphapo_alpha)
        lost = alpha_reward(p.rejected, p.rejected_length, o.alphapo_alpha)
        loss = soft_logistic(p.beta * (won.value - lost.value) - o.simpo_gamma, p, o)
        return Term(loss.value, loss.slope * p.beta * won.slope, -loss.slope * p.beta * lost.slope)

    else:  # -log sigmoid((beta (r_w - r_l) - (m_w - m_l)) / modpo_weight)
        tl.static_assert(KIND == "modpo")
        u = p.beta * (p.chosen_ratio - p.rejected_ratio) - (p.chosen_margin - p.rejected_margin)
        loss = smoothed(u / o.modpo_weight, tl.full([], 1.0, tl.float64))
        slope = loss.slope * p.beta / o.modpo_weight
        return Term(loss.value, slope, -slope)
