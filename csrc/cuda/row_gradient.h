// From the sums of a row to its outputs and its gradient
//
//     dlogit_v = [grad (onehot_v - p_v) - grad_H p_v (log p_v + H)] * scale * (1 - tanh^2),
//     p_v = softmax_v = factor E^(c y_v - shift), with the gradients of the log-prob and of the entropy H
//
// At the label 1 - p would cancel if p is close to 1; there it is computed as -expm1(logp).
#pragma once

#include "row_sums.h"

namespace cpo::cuda {

template <typename Acc>
struct Outputs {
  Acc* logp;   // [rows]
  Acc* lse;    // [rows]
  Acc* extra;  // [4, rows], if requested: entropy, log sum p^2, mean z, 1 if the label has the largest logit
};

// A row's softmax, and its log-prob as nat * (y - top) - log_sum.
template <typename Acc>
struct Softmax {
  Acc shift, factor, top, log_sum;
};

// The column of a label; -1 if it is out of range.
template <typename T>
CPO_DEVICE int column_of(const Problem<T>& p, int64_t label) {
  return label >= 0 && label < p.columns ? int(label) : -1;
}

// The label's logit as stored; NaN if the label is out of range.
template <typename T>
CPO_DEVICE AccOf<T> stored_logit(const T* row, int column) {
  return column >= 0 ? widened(row[column]) : AccOf<T>(NAN);
}

// Sums are taken relative to their largest term as rounded: if it is the only term, the logarithm is 0.
// `y_label` is NaN if the label is out of range, which makes the whole row NaN.
template <typename T>
CPO_DEVICE Softmax<AccOf<T>> softmax_of(const Sums<AccOf<T>>& a, AccOf<T> y_label, const Problem<T>& p) {
  using Acc = AccOf<T>;
  const Acc shift = shift_of(a.top, p.c), largest = a.top == -Acc(INFINITY) ? Acc(0) : fma(a.top, p.c, -shift);
  const Acc log_sum = log(a.sum / exp_unit(largest));
  return {shift, isnan(y_label) ? y_label : Acc(1) / a.sum, a.top, log_sum};
}

// The same from a log-sum-exp and the constant that the y lack. The rounding errors of lse / nat and of its product
// with c go into the factor.
template <typename T>
CPO_DEVICE Softmax<AccOf<T>> softmax_of_lse(AccOf<T> lse, AccOf<T> lacking, const Problem<T>& p) {
  using Acc = AccOf<T>;
  if (lacking != 0) lse = fma(-p.nat, lacking, lse);
  const Acc y = lse / p.nat, shift = mul_rn(y, p.c);
  const Acc rest = fma(p.nat, y, -lse) - kLogE<Acc> * fma(y, p.c, -shift);
  return {shift, exp(rest), Acc(0), lse};
}

// A row's label once the row is summed.
template <typename Acc>
struct Label {
  Acc y;        // NaN if the label is out of range
  bool is_top;  // the stored logit is the largest of the row
};

// stored: y of the label as stored. The exact one replaces it in the sums.
template <bool kSoftcap, bool kExtras, bool kAnchored, typename T>
CPO_DEVICE Label<AccOf<T>> label_of(Sums<AccOf<T>>& a, AccOf<T> stored, AccOf<T> offset, int64_t i,
                                    const Problem<T>& p) {
  Label<AccOf<T>> label{stored, stored == a.top};
  if (kAnchored && !isnan(stored)) {
    label.y = y_of<kSoftcap, kAnchored>(p, exact_logit(p, i), offset);
    replace<kExtras>(a, stored, label.y, p.c);
  }
  return label;
}

template <bool kSoftcap, bool kExtras, bool kAnchored, typename T>
CPO_DEVICE void store_outputs(const Outputs<AccOf<T>>& out, int64_t i, const Sums<AccOf<T>>& a,
                              const Softmax<AccOf<T>>& s, const Label<AccOf<T>>& label, const Problem<T>& p) {
  using Acc = AccOf<T>;
  const Acc lse = fma(p.nat, a.top, s.log_sum), lack = lacking<kSoftcap, kAnchored>(p, i);
  out.logp[i] = fma(p.nat, label.y - a.top, -s.log_sum);  // explicit: the same bits with and without extras
  out.lse[i] = isnan(label.y) ? label.y : kAnchored ? fma(p.nat, lack, lse) : lse;
  if (!kExtras) return;
  const Acc largest = fma(a.top, p.c, -s.shift);
  out.extra[i] = s.log_sum - kLogE<Acc> * (a.sum_t / a.sum - largest);
  out.extra[p.rows + i] = log(a.sum_sq) - 2 * (s.log_sum + kLogE<Acc> * largest);
  const Acc mean = a.sum_y / p.columns;
  out.extra[2 * p.rows + i] = p.nat * (kAnchored ? mean + lack : mean);
  out.extra[3 * p.rows + i] = label.is_top && !isnan(a.sum) ? Acc(1) : Acc(0);
}

template <bool kExtras, typename Acc>
CPO_DEVICE void store_ignored(const Outputs<Acc>& out, int64_t i, int64_t rows) {
  out.logp[i] = 0;
  out.lse[i] = 0;
  for (int k = 0; kExtras && k < 4; ++k) out.extra[k * rows + i] = 0;
}

// Incoming gradients of a row's log-prob and entropy, and the entropy.
template <typename Acc>
struct Upstream {
  Acc logp, entropy, value;
};

// The gradient of a column from its t = c y - shift: E^t (factor + rise t), times 1 - tanh^2 under a softcap. rise is 0
// if the entropy has no gradient.
template <typename Acc>
struct Weights {
  Acc shift, factor, rise, offset;
};

template <bool kSoftcap, bool kAnchored, bool kEntropy, typename T>
CPO_DEVICE AccOf<T> gradient_of(AccOf<T> logit, const Weights<AccOf<T>>& w, const Problem<T>& p) {
  using Acc = AccOf<T>;
  Acc slope = 1;
  const Acc y = y_and_slope<kSoftcap, kAnchored>(p, logit, w.offset, slope);
  const Acc t = fma(y, p.c, -w.shift), power = exp_unit(t);
  Acc g = w.factor * power;
  if (kEntropy) g = power > 0 ? power * fma(w.rise, t, w.factor) : power;
  return kSoftcap ? g * slope : g;
}

// Overwrites this thread's part of a row with its gradient, last chunk first: the chunk read last is still in the cache
// or, if `held`, in `v`. x_label: the label's logit, which only its owner may read once writing has begun.
template <bool kSoftcap, bool kAnchored, bool kEntropy, int kThreads, int kVectors, typename T>
CPO_DEVICE void write(const Row<T>& row, const Part<kThreads, kVectors>& part, const Problem<T>& p, int label,
                      AccOf<T> x_label, AccOf<T> offset, const Softmax<AccOf<T>>& s, const Upstream<AccOf<T>>& grad,
                      Pack (&v)[kVectors], bool held) {
  using Acc = AccOf<T>;
  const Acc scaled = grad.logp * p.scale;
  Weights<Acc> w{s.shift, -scaled * s.factor, 0, offset};
  if (kEntropy) {
    const Acc scaled_entropy = grad.entropy * p.scale;
    w.rise = -scaled_entropy * s.factor * kLogE<Acc>;
    w.factor = fma(-scaled_entropy * s.factor, log(s.factor) + grad.value, w.factor);
  }
  const int own_label = part.owns(row, label) ? label : -1;
  T at_label{};
  if (own_label >= 0) {
    Acc slope = 1;
    const Acc y = y_and_slope<kSoftcap, kAnchored>(p, x_label, offset, slope);
    const Acc logp = fma(p.nat, y - s.top, -s.log_sum);
    Acc g = -expm1(logp) * scaled;
    if (kEntropy && exp(logp) > 0) g -= exp(logp) * (logp + grad.value) * grad.entropy * p.scale;
    at_label = rounded<T>(g * slope);
  }
  const int chunks = part.chunks(row), edge = part.edge(row);
  const auto gradient = [&](Acc x) { return gradient_of<kSoftcap, kAnchored, kEntropy>(x, w, p); };
  if (edge >= 0) row.start[edge] = rounded<T>(gradient(widened(row.start[edge])));
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    if (!held || chunk < chunks - 1) part.load(row, chunk, v);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = part.vector(chunk, j);
      if (k >= row.vectors) break;
      Acc x[Number<T>::kPer];
      Number<T>::unpack(v[j], x);
#pragma unroll
      for (int e = 0; e < Number<T>::kPer; ++e) x[e] = gradient(x[e]);
      store16(row.vector(k), Number<T>::pack(x));
    }
  }
  if (own_label >= 0) row.start[own_label] = at_label;
  part.clear(Row<T>(row.start + p.columns, p.width - p.columns));
}

}  // namespace cpo::cuda
