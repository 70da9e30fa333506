// What follows from a row's sums: its outputs, and its gradient
//
//     dlogit_v = grad * scale * (1 - tanh^2) * (onehot_v - softmax_v),   softmax_v = factor E^(c y_v - shift)
//
// At the label 1 - softmax cancels where the model is sure; there it is -expm1(logp).
#pragma once

#include "row_sums.h"

namespace cpo::cuda {

template <typename Acc>
struct Outputs {
  Acc* logp;   // [rows]
  Acc* lse;    // [rows]
  Acc* extra;  // [4, rows], where asked for: entropy, log sum p^2, mean z, 1 where the label has the top logit
};

// A row's softmax, and its log-prob as nat * (y - top) - log_sum.
template <typename Acc>
struct Softmax {
  Acc shift, factor, top, log_sum;
};

// The column of a label; -1 where it is out of range.
template <typename T>
CPO_DEVICE int column_of(const Problem<T>& p, int64_t label) {
  return label >= 0 && label < p.columns ? int(label) : -1;
}

// The label's logit; NaN where the label is out of range.
template <typename T>
CPO_DEVICE AccOf<T> label_logit(const T* row, int column) {
  return column >= 0 ? widened(row[column]) : AccOf<T>(NAN);
}

// Sums are taken relative to their largest term as it was rounded: where it is all there is, its logarithm is 0.
// `y_label` is NaN where the label is out of range, and then all of the row is.
template <typename T>
CPO_DEVICE Softmax<AccOf<T>> softmax_of(const Sums<AccOf<T>>& a, AccOf<T> y_label, const Problem<T>& p) {
  using Acc = AccOf<T>;
  const Acc shift = shift_of(a.top, p.c), largest = a.top == -Acc(INFINITY) ? Acc(0) : fma(a.top, p.c, -shift);
  const Acc log_sum = log(a.sum / exp_unit(largest));
  return {shift, isnan(y_label) ? y_label : Acc(1) / a.sum, a.top, log_sum};
}

// The same from a log-sum-exp. What rounding lse / nat and its product with c leaves goes into the factor.
template <typename T>
CPO_DEVICE Softmax<AccOf<T>> softmax_of_lse(AccOf<T> lse, const Problem<T>& p) {
  using Acc = AccOf<T>;
  const Acc y = lse / p.nat, shift = mul_rn(y, p.c);
  const Acc rest = fma(p.nat, y, -lse) - kLogE<Acc> * fma(y, p.c, -shift);
  return {shift, exp(rest), Acc(0), lse};
}

template <bool kExtras, typename T>
CPO_DEVICE void store_outputs(const Outputs<AccOf<T>>& out, int64_t i, const Sums<AccOf<T>>& a,
                              const Softmax<AccOf<T>>& s, AccOf<T> y_label, const Problem<T>& p) {
  using Acc = AccOf<T>;
  out.logp[i] = fma(p.nat, y_label - a.top, -s.log_sum);  // explicit: the same bits with and without extras
  out.lse[i] = isnan(y_label) ? y_label : fma(p.nat, a.top, s.log_sum);
  if (!kExtras) return;
  const Acc largest = fma(a.top, p.c, -s.shift);
  out.extra[i] = s.log_sum - kLogE<Acc> * (a.sum_t / a.sum - largest);
  out.extra[p.rows + i] = log(a.sum_sq) - 2 * (s.log_sum + kLogE<Acc> * largest);
  out.extra[2 * p.rows + i] = p.nat * (a.sum_y / p.columns);
  out.extra[3 * p.rows + i] = y_label == a.top && !isnan(a.sum) ? Acc(1) : Acc(0);
}

template <bool kExtras, typename Acc>
CPO_DEVICE void store_ignored(const Outputs<Acc>& out, int64_t i, int64_t rows) {
  out.logp[i] = 0;
  out.lse[i] = 0;
  for (int k = 0; kExtras && k < 4; ++k) out.extra[k * rows + i] = 0;
}

template <bool kSoftcap, typename T>
CPO_DEVICE AccOf<T> gradient_of(AccOf<T> logit, const Softmax<AccOf<T>>& s, AccOf<T> factor, const Problem<T>& p) {
  AccOf<T> slope = 1;
  const AccOf<T> y = kSoftcap ? tanh_and_slope(logit * p.inner, slope) : logit;
  const AccOf<T> g = factor * exp_unit(fma(y, p.c, -s.shift));
  return kSoftcap ? g * slope : g;
}

// Overwrites this thread's part of a row with its gradient, last chunk first: what was read last is still in the cache,
// or, if `held`, in `v`. x_label: the label's logit, which only its owner may read once the writing has begun.
template <bool kSoftcap, int kThreads, int kVectors, typename T>
CPO_DEVICE void write(const Row<T>& row, const Part<kThreads, kVectors>& part, const Problem<T>& p, int label,
                      AccOf<T> x_label, const Softmax<AccOf<T>>& s, AccOf<T> grad, Pack (&v)[kVectors], bool held) {
  using Acc = AccOf<T>;
  const Acc scaled = grad * p.scale, factor = -scaled * s.factor;
  const int own_label = part.owns(row, label) ? label : -1;
  T at_label{};
  if (own_label >= 0) {
    Acc slope = 1;
    const Acc y = kSoftcap ? tanh_and_slope(x_label * p.inner, slope) : x_label;
    at_label = rounded<T>(-expm1(fma(p.nat, y - s.top, -s.log_sum)) * scaled * slope);
  }
  const int chunks = part.chunks(row), edge = part.edge(row);
  if (edge >= 0) row.start[edge] = rounded<T>(gradient_of<kSoftcap>(widened(row.start[edge]), s, factor, p));
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    if (!held || chunk < chunks - 1) part.load(row, chunk, v);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = part.vector(chunk, j);
      if (k >= row.vectors) break;
      Acc x[Number<T>::kPer];
      Number<T>::unpack(v[j], x);
#pragma unroll
      for (int e = 0; e < Number<T>::kPer; ++e) x[e] = gradient_of<kSoftcap>(x[e], s, factor, p);
      store16(row.vector(k), Number<T>::pack(x));
    }
  }
  if (own_label >= 0) row.start[own_label] = at_label;
  part.clear(Row<T>(row.start + p.columns, p.width - p.columns));
}

}  // namespace cpo::cuda
