// Every pairwise loss with its gradient: plain functions of numbers, for the CPU and for CUDA.
//
// L_w, L_l: summed log-probs of the chosen and the rejected response; r = L - ref; n: number of tokens;
// s(r): score of the f-divergence (f_score); u: the argument of a logistic loss. Sources: reference/loss_types.py.
// Each loss returns {l, dl/dL_w, dl/dL_l}.
#pragma once

#include <math.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define CPO_HOST_DEVICE __host__ __device__
// One copy of what many formulas call: 5,700 instructions instead of 21,600 on sm_90, and no spills on sm_100.
#define CPO_NOINLINE __noinline__
#else
#define CPO_HOST_DEVICE
#define CPO_NOINLINE
#endif

namespace cpo {

// The order of LOSS_TYPES in cpo_kernels/reference/loss_types.py.
enum LossType {
  kSigmoid,
  kHinge,
  kIpo,
  kExoPair,
  kNcaPair,
  kRobust,
  kBcoPair,
  kSppoHard,
  kAot,
  kAotUnpaired,
  kApoZero,
  kApoDown,
  kDiscopop,
  kSft,
  kSigmoidNorm,
  kSimpo,
  kOrpo,
  kContrastiveCpo,
  kAlphapo,
  kModpo,
  kNumLossTypes
};

// The order of OPTIONS in cpo_kernels/reference/terms.py.
struct LossOptions {
  double beta, label_smoothing, tau, margin, tie_margin, f_divergence, f_alpha, discopop_tau, simpo_gamma,
      alphapo_alpha, nll_alpha, modpo_weight;
};
constexpr int kNumOptions = 12;
static_assert(sizeof(LossOptions) == kNumOptions * sizeof(double), "LossOptions is read as an array");

struct LossPair {
  double chosen, rejected;                // L_w, L_l
  double chosen_ref, rejected_ref;        // 0 without a reference
  double chosen_length, rejected_length;  // n, at least 1
  double chosen_margin, rejected_margin;  // MODPO's w_{-k} . m(y)
  double beta;
  double gap;        // |Delta R|; infinite without scores
  double nll_scale;  // divisor of the loss / number of chosen tokens
};

struct LossTerm {
  double loss, chosen, rejected;
};

// Exponents are clamped here, as in reference/terms.py, with gradient 0 beyond.
constexpr double kMaxExponent = 80.0;
constexpr double kMaxOrpoLogp = -1e-12;

CPO_HOST_DEVICE inline bool is_reference_free(int type) {
  return type == kSft || type == kSimpo || type == kOrpo || type == kContrastiveCpo || type == kAlphapo;
}
CPO_HOST_DEVICE inline bool is_averaged(int type) { return type == kSimpo || type == kOrpo || type == kAlphapo; }
CPO_HOST_DEVICE inline bool divides_by_length(int type) {
  return type == kIpo || type == kSigmoidNorm || is_averaged(type);
}
CPO_HOST_DEVICE inline bool has_nll(int type, const LossOptions& o) {
  return type == kSft || ((type == kOrpo || type == kContrastiveCpo) && o.nll_alpha != 0.0);
}

CPO_HOST_DEVICE CPO_NOINLINE inline double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return x >= 0.0 ? 1.0 / (1.0 + e) : e / (1.0 + e);
}
CPO_HOST_DEVICE CPO_NOINLINE inline double log_sigmoid(double x) { return (x < 0.0 ? x : 0.0) - log1p(exp(-fabs(x))); }

struct ValueAndSlope {
  double value, slope;
};

// f'(e^r) up to constants that cancel in a pair. reverse_kl: r; forward_kl: 1 - e^-r; js: log 2 + log sigmoid(r);
// alpha: (e^((alpha - 1) r) - 1) / (alpha - 1), which is r at alpha = 1.
CPO_HOST_DEVICE CPO_NOINLINE inline ValueAndSlope f_score(double r, double f_divergence, double alpha) {
  const int kind = static_cast<int>(f_divergence);
  if (kind == 1) {
    const double x = -r > kMaxExponent ? kMaxExponent : -r;
    return {-expm1(x), -r > kMaxExponent ? 0.0 : exp(x)};
  }
  if (kind == 2) return {log(2.0) + log_sigmoid(r), sigmoid(-r)};
  const double a = alpha - 1.0;
  if (kind == 3 && fabs(a) >= 1e-6) {
    const double x = a * r > kMaxExponent ? kMaxExponent : a * r;
    return {expm1(x) / a, a * r > kMaxExponent ? 0.0 : exp(x)};
  }
  return {r, 1.0};
}

// A loss of u with du/dL_w and du/dL_l.
CPO_HOST_DEVICE inline LossTerm chain(ValueAndSlope l, double du_chosen, double du_rejected) {
  return {l.value, l.slope * du_chosen, l.slope * du_rejected};
}

// -q log sigmoid(u) - (1 - q) log sigmoid(-u)
CPO_HOST_DEVICE CPO_NOINLINE inline ValueAndSlope logistic(double u, double q) {
  double value = -q * log_sigmoid(u);
  if (q != 1.0) value -= (1.0 - q) * log_sigmoid(-u);
  return {value, (1.0 - q) * sigmoid(u) - q * sigmoid(-u)};
}

// margin |gap|
CPO_HOST_DEVICE inline double offset(const LossPair& p, const LossOptions& o) {
  return o.margin != 0.0 ? o.margin * p.gap : 0.0;
}

// logistic(u - margin |gap|) with q = sigmoid(|gap| / tau), or 1 - label_smoothing where tau is 0.
CPO_HOST_DEVICE inline ValueAndSlope soft_logistic(double u, const LossPair& p, const LossOptions& o) {
  const double q = o.tau != 0.0 ? sigmoid(p.gap / o.tau) : 1.0 - o.label_smoothing;
  return logistic(u - offset(p, o), q);
}

// beta delta, delta = s(r_w) - s(r_l), with its slopes.
struct ScaledDelta {
  double u, du_chosen, du_rejected;
};
CPO_HOST_DEVICE inline ScaledDelta scaled_delta(const LossPair& p, const LossOptions& o, double n_chosen,
                                                double n_rejected) {
  const ValueAndSlope w = f_score(p.chosen - p.chosen_ref, o.f_divergence, o.f_alpha);
  const ValueAndSlope l = f_score(p.rejected - p.rejected_ref, o.f_divergence, o.f_alpha);
  return {p.beta * (w.value / n_chosen - l.value / n_rejected), p.beta * w.slope / n_chosen,
          -p.beta * l.slope / n_rejected};
}

// -log sigmoid(beta delta), soft targets and margin as in soft_logistic
CPO_HOST_DEVICE inline LossTerm sigmoid_loss(const LossPair& p, const LossOptions& o) {
  const ScaledDelta d = scaled_delta(p, o, 1.0, 1.0);
  return chain(soft_logistic(d.u, p, o), d.du_chosen, d.du_rejected);
}

// relu(1 - (beta delta - margin |gap|))
CPO_HOST_DEVICE inline LossTerm hinge_loss(const LossPair& p, const LossOptions& o) {
  const ScaledDelta d = scaled_delta(p, o, 1.0, 1.0);
  const double x = 1.0 - (d.u - offset(p, o));
  return chain({x < 0.0 ? 0.0 : x, x > 0.0 ? -1.0 : 0.0}, d.du_chosen, d.du_rejected);
}

// (s_w / n_w - s_l / n_l - 1 / (2 beta))^2
CPO_HOST_DEVICE inline LossTerm ipo_loss(const LossPair& p, const LossOptions& o) {
  const ValueAndSlope w = f_score(p.chosen - p.chosen_ref, o.f_divergence, o.f_alpha);
  const ValueAndSlope l = f_score(p.rejected - p.rejected_ref, o.f_divergence, o.f_alpha);
  const double x = w.value / p.chosen_length - l.value / p.rejected_length - 1.0 / (2.0 * p.beta);
  return chain({x * x, 2.0 * x}, w.slope / p.chosen_length, -l.slope / p.rejected_length);
}

// q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps), q = sigmoid(u), u = beta delta, eps = label_smoothing;
// dl/du = q (1 - q) (u - log(1 - eps) + log(eps))
CPO_HOST_DEVICE inline LossTerm exo_pair_loss(const LossPair& p, const LossOptions& o) {
  const ScaledDelta d = scaled_delta(p, o, 1.0, 1.0);
  const double log_w = log1p(-o.label_smoothing), log_l = log(o.label_smoothing);
  const double q = sigmoid(d.u), r = sigmoid(-d.u);
  const double value = q * (log_sigmoid(d.u) - log_w) + r * (log_sigmoid(-d.u) - log_l);
  return chain({value, q * r * (d.u - log_w + log_l)}, d.du_chosen, d.du_rejected);
}

// -log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2
CPO_HOST_DEVICE inline LossTerm nca_pair_loss(const LossPair& p) {
  const double w = p.beta * (p.chosen - p.chosen_ref), l = p.beta * (p.rejected - p.rejected_ref);
  return {-log_sigmoid(w) - 0.5 * (log_sigmoid(-w) + log_sigmoid(-l)), p.beta * (0.5 * sigmoid(w) - sigmoid(-w)),
          p.beta * 0.5 * sigmoid(l)};
}

// (-(1 - e) log sigmoid(u) + e log sigmoid(-u)) / (1 - 2 e), u = beta delta, e = label_smoothing
CPO_HOST_DEVICE inline LossTerm robust_loss(const LossPair& p, const LossOptions& o) {
  const ScaledDelta d = scaled_delta(p, o, 1.0, 1.0);
  const double e = o.label_smoothing, norm = 1.0 / (1.0 - 2.0 * e);
  const double value = (-(1.0 - e) * log_sigmoid(d.u) + e * log_sigmoid(-d.u)) * norm;
  return chain({value, (-(1.0 - e) * sigmoid(-d.u) - e * sigmoid(d.u)) * norm}, d.du_chosen, d.du_rejected);
}

// -log sigmoid(beta r_w) - log sigmoid(-beta r_l)
CPO_HOST_DEVICE inline LossTerm bco_pair_loss(const LossPair& p) {
  const double w = p.beta * (p.chosen - p.chosen_ref), l = p.beta * (p.rejected - p.rejected_ref);
  return {-log_sigmoid(w) - log_sigmoid(-l), -p.beta * sigmoid(-w), p.beta * sigmoid(l)};
}

// (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2
CPO_HOST_DEVICE inline LossTerm sppo_hard_loss(const LossPair& p) {
  const double w = p.chosen - p.chosen_ref - 0.5 / p.beta, l = p.rejected - p.rejected_ref + 0.5 / p.beta;
  return {w * w + l * l, 2.0 * w, 2.0 * l};
}

// 1 - sigmoid(beta r_w) + sigmoid(beta r_l)
CPO_HOST_DEVICE inline LossTerm apo_zero_loss(const LossPair& p) {
  const double w = p.beta * (p.chosen - p.chosen_ref), l = p.beta * (p.rejected - p.rejected_ref);
  return {sigmoid(-w) + sigmoid(l), -p.beta * sigmoid(w) * sigmoid(-w), p.beta * sigmoid(l) * sigmoid(-l)};
}

// sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))
CPO_HOST_DEVICE inline LossTerm apo_down_loss(const LossPair& p) {
  const double w = p.beta * (p.chosen - p.chosen_ref), d = w - p.beta * (p.rejected - p.rejected_ref);
  const double slope_d = p.beta * sigmoid(d) * sigmoid(-d);
  return {sigmoid(w) + sigmoid(-d), p.beta * sigmoid(w) * sigmoid(-w) - slope_d, slope_d};
}

// -(1 - m) log sigmoid(u) + m e^-u, u = beta delta, m = sigmoid(u / discopop_tau). m e^-u is one exponential.
CPO_HOST_DEVICE inline LossTerm discopop_loss(const LossPair& p, const LossOptions& o) {
  const ScaledDelta d = scaled_delta(p, o, 1.0, 1.0);
  const double v = d.u / o.discopop_tau, m = sigmoid(v), rest = sigmoid(-v);
  const double exponential = exp(log_sigmoid(v) - d.u);
  const double value = -rest * log_sigmoid(d.u) + exponential;
  const double slope =
      m * rest / o.discopop_tau * log_sigmoid(d.u) - rest * sigmoid(-d.u) + exponential * (rest / o.discopop_tau - 1.0);
  return chain({value, slope}, d.du_chosen, d.du_rejected);
}

// -L_w nll_scale: summed and divided by the loss's divisor, the NLL per chosen token
CPO_HOST_DEVICE inline LossTerm sft_loss(const LossPair& p) { return {-p.chosen * p.nll_scale, -p.nll_scale, 0.0}; }

CPO_HOST_DEVICE inline LossTerm add_nll(LossTerm term, const LossPair& p, const LossOptions& o) {
  if (o.nll_alpha == 0.0) return term;
  const LossTerm nll = sft_loss(p);
  return {term.loss + o.nll_alpha * nll.loss, term.chosen + o.nll_alpha * nll.chosen, term.rejected};
}

// -log sigmoid(beta (s_w / n_w - s_l / n_l))
CPO_HOST_DEVICE inline LossTerm sigmoid_norm_loss(const LossPair& p, const LossOptions& o) {
  const ScaledDelta d = scaled_delta(p, o, p.chosen_length, p.rejected_length);
  return chain(soft_logistic(d.u, p, o), d.du_chosen, d.du_rejected);
}

// -log sigmoid(beta (L_w / n_w - L_l / n_l) - simpo_gamma)
CPO_HOST_DEVICE inline LossTerm simpo_loss(const LossPair& p, const LossOptions& o) {
  const double u = p.beta * (p.chosen / p.chosen_length - p.rejected / p.rejected_length) - o.simpo_gamma;
  return chain(soft_logistic(u, p, o), p.beta / p.chosen_length, -p.beta / p.rejected_length);
}

// log odds a - log(1 - e^a) of a = L / n < 0, with its slope in L: 1 / (n (1 - e^a)).
CPO_HOST_DEVICE CPO_NOINLINE inline ValueAndSlope log_odds(double logp, double n) {
  const double mean = logp / n, a = mean > kMaxOrpoLogp ? kMaxOrpoLogp : mean;
  const double log1mexp = a > -0.6931471805599453 ? log(-expm1(a)) : log1p(-exp(a));
  return {a - log1mexp, mean > kMaxOrpoLogp ? 0.0 : -1.0 / (n * expm1(a))};
}

// -beta log sigmoid(o_w - o_l) + nll_alpha NLL(y_w), o = log_odds(L, n)
CPO_HOST_DEVICE inline LossTerm orpo_loss(const LossPair& p, const LossOptions& o) {
  const ValueAndSlope w = log_odds(p.chosen, p.chosen_length), l = log_odds(p.rejected, p.rejected_length);
  const double x = w.value - l.value, slope = -p.beta * sigmoid(-x);
  return add_nll({-p.beta * log_sigmoid(x), slope * w.slope, -slope * l.slope}, p, o);
}

// -log sigmoid(beta (L_w - L_l)) + nll_alpha NLL(y_w)
CPO_HOST_DEVICE inline LossTerm contrastive_cpo_loss(const LossPair& p, const LossOptions& o) {
  return add_nll(chain(soft_logistic(p.beta * (p.chosen - p.rejected), p, o), p.beta, -p.beta), p, o);
}

// (1 - e^(-a L / n)) / a, and L / n at a = 0, with its slope in L.
CPO_HOST_DEVICE CPO_NOINLINE inline ValueAndSlope alpha_reward(double logp, double n, double a) {
  if (a == 0.0) return {logp / n, 1.0 / n};
  const double exponent = -a * logp / n, x = exponent > kMaxExponent ? kMaxExponent : exponent;
  return {-expm1(x) / a, exponent > kMaxExponent ? 0.0 : exp(x) / n};
}

// -log sigmoid(beta (r_w - r_l) - simpo_gamma), r = alpha_reward(L, n)
CPO_HOST_DEVICE inline LossTerm alphapo_loss(const LossPair& p, const LossOptions& o) {
  const ValueAndSlope w = alpha_reward(p.chosen, p.chosen_length, o.alphapo_alpha);
  const ValueAndSlope l = alpha_reward(p.rejected, p.rejected_length, o.alphapo_alpha);
  return chain(soft_logistic(p.beta * (w.value - l.value) - o.simpo_gamma, p, o), p.beta * w.slope, -p.beta * l.slope);
}

// -log sigmoid((beta (r_w - r_l) - (m_w - m_l)) / modpo_weight)
CPO_HOST_DEVICE inline LossTerm modpo_loss(const LossPair& p, const LossOptions& o) {
  const double ratio = (p.chosen - p.chosen_ref) - (p.rejected - p.rejected_ref);
  const double u = (p.beta * ratio - (p.chosen_margin - p.rejected_margin)) / o.modpo_weight;
  return chain(logistic(u, 1.0), p.beta / o.modpo_weight, -p.beta / o.modpo_weight);
}

// aot and aot_unpaired at two sorted values: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), d = high - low,
// e = label_smoothing, with the slope in d.
CPO_HOST_DEVICE inline ValueAndSlope aot_loss(double high, double low, double beta, const LossOptions& o) {
  const ValueAndSlope l = logistic(beta * (high - low), 1.0 - o.label_smoothing);
  return {l.value, l.slope * beta};
}

// The loss `type` of one pair; aot and aot_unpaired, which need the whole batch, have aot_loss.
CPO_HOST_DEVICE inline LossTerm pair_loss(int type, const LossPair& p, const LossOptions& o) {
  switch (type) {
    case kSigmoid: return sigmoid_loss(p, o);
    case kHinge: return hinge_loss(p, o);
    case kIpo: return ipo_loss(p, o);
    case kExoPair: return exo_pair_loss(p, o);
    case kNcaPair: return nca_pair_loss(p);
    case kRobust: return robust_loss(p, o);
    case kBcoPair: return bco_pair_loss(p);
    case kSppoHard: return sppo_hard_loss(p);
    case kApoZero: return apo_zero_loss(p);
    case kApoDown: return apo_down_loss(p);
    case kDiscopop: return discopop_loss(p, o);
    case kSft: return sft_loss(p);
    case kSigmoidNorm: return sigmoid_norm_loss(p, o);
    case kSimpo: return simpo_loss(p, o);
    case kOrpo: return orpo_loss(p, o);
    case kContrastiveCpo: return contrastive_cpo_loss(p, o);
    case kAlphapo: return alphapo_loss(p, o);
    case kModpo: return modpo_loss(p, o);
    default: return {0.0, 0.0, 0.0};
  }
}

// The term of one objective in Delta R * sum(weight): weight (g(a) - g(b)), g = -strength |P - c|, or P if c is NaN.
CPO_HOST_DEVICE inline double weighted_gain(double a, double b, double condition, double weight, double strength) {
  if (isnan(condition)) return weight * (a - b);
  return weight * (strength * (fabs(b - condition) - fabs(a - condition)));
}

}  // namespace cpo
