// What a row's log-probs need: its largest y and sums of exponentials, in one sweep (online softmax, Milakov and
// Gimelshein 2018). Every thread keeps its own maximum and rescales its sums once per 16-byte vector, so a 16-bit
// column takes 1.1 exponentials. Lanes, warps, blocks of a cluster and pieces of a row are then combined in a fixed
// order.
#pragma once

#include "row.h"

namespace cpo::cuda {

template <typename Acc>
struct Sums {
  Acc top;                   // largest y
  Acc sum;                   // of e = E^(c y - shift), shift = shift_of(top)
  Acc sum_t, sum_sq, sum_y;  // extras: of e (c y - shift), e^2, y

  CPO_DEVICE static Sums none() { return {-Acc(INFINITY), 0, 0, 0, 0}; }
};

// Rounded once, so that all exponentials of a row are relative to the same number. A row that is all -inf has sums of 0
// for any shift.
template <typename Acc>
CPO_DEVICE Acc shift_of(Acc top, Acc c) {
  return top == -Acc(INFINITY) ? Acc(0) : mul_rn(top, c);
}

// Rescales the sums to a larger top; the caller applies the factor to `sum`. If the factor is 0, they are set to 0
// instead of multiplied: relative to a top such as -3e38, which masks use for -inf, they may be infinite.
template <bool kExtras, typename Acc>
CPO_DEVICE Acc raise(Sums<Acc>& a, Acc top, Acc c) {
  const Acc step = a.top == top ? Acc(0) : mul_rn(a.top, c) - shift_of(top, c);
  const Acc factor = exp_unit(step);
  const bool left = factor > 0;
  if (!left && !isnan(a.sum)) a.sum = 0;
  if (kExtras) {
    a.sum_t = left ? factor * fma(step, a.sum, a.sum_t) : Acc(0);
    a.sum_sq = left ? factor * factor * a.sum_sq : Acc(0);
  }
  a.top = top;
  return left ? factor : Acc(0);
}

// y, and slope = 1 - tanh^2 under a softcap; without one, slope is not changed.
template <bool kSoftcap, bool kAnchored, typename T>
CPO_DEVICE AccOf<T> y_and_slope(const Problem<T>& p, AccOf<T> logit, AccOf<T> offset, AccOf<T>& slope) {
  if (!kSoftcap) return logit;
  return tanh_and_slope(kAnchored ? fma(logit, p.inner, offset) : logit * p.inner, slope);
}

template <bool kSoftcap, bool kAnchored, typename T>
CPO_DEVICE AccOf<T> y_of(const Problem<T>& p, AccOf<T> logit, AccOf<T> offset) {
  AccOf<T> slope;
  return y_and_slope<kSoftcap, kAnchored>(p, logit, offset, slope);
}

// Adds `n` logits to the sums.
template <bool kSoftcap, bool kExtras, bool kAnchored, int n, typename T>
CPO_DEVICE void fold(Sums<AccOf<T>>& a, AccOf<T> (&x)[n], const Problem<T>& p, AccOf<T> offset) {
  using Acc = AccOf<T>;
  Acc top = a.top;
#pragma unroll
  for (int e = 0; e < n; ++e) {
    x[e] = y_of<kSoftcap, kAnchored>(p, x[e], offset);
    top = fmax(top, x[e]);
  }
  const Acc factor = raise<kExtras>(a, top, p.c), shift = shift_of(top, p.c);
  Acc sum = 0;
#pragma unroll
  for (int e = 0; e < n; ++e) {
    const Acc t = fma(x[e], p.c, -shift), power = exp_unit(t);
    sum += power;
    if (kExtras) {
      if (power > 0) a.sum_t = fma(power, t, a.sum_t);
      a.sum_sq = fma(power, power, a.sum_sq);
      a.sum_y += x[e];
    }
  }
  a.sum = fma(a.sum, factor, sum);
}

// The sums of this thread's part of a row; `v` keeps the last chunk.
template <bool kSoftcap, bool kExtras, bool kAnchored, int kThreads, int kVectors, typename T>
CPO_DEVICE Sums<AccOf<T>> scan(const Row<T>& row, const Part<kThreads, kVectors>& part, const Problem<T>& p,
                               AccOf<T> offset, Pack (&v)[kVectors]) {
  Sums<AccOf<T>> a = Sums<AccOf<T>>::none();
  const int chunks = part.chunks(row);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    part.load(row, chunk, v);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (part.vector(chunk, j) >= row.vectors) break;
      AccOf<T> x[Number<T>::kPer];
      Number<T>::unpack(v[j], x);
      fold<kSoftcap, kExtras, kAnchored>(a, x, p, offset);
    }
  }
  const int edge = part.edge(row);
  if (edge >= 0) {
    AccOf<T> x[1] = {widened(row.start[edge])};
    fold<kSoftcap, kExtras, kAnchored>(a, x, p, offset);
  }
  return a;
}

// The sums of the warp, bitwise equal in every lane.
template <bool kExtras, typename Acc>
CPO_DEVICE Sums<Acc> meet(Sums<Acc> a, Acc c) {
  Acc top = a.top;
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) top = fmax(top, shuffle_xor(top, mask));
  a.sum *= raise<kExtras>(a, top, c);
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) {
    a.sum += shuffle_xor(a.sum, mask);
    if (kExtras) {
      a.sum_t += shuffle_xor(a.sum_t, mask);
      a.sum_sq += shuffle_xor(a.sum_sq, mask);
      a.sum_y += shuffle_xor(a.sum_y, mask);
    }
  }
  return a;
}

// The sums of all[0 .. count), count <= 32.
template <bool kExtras, typename Acc>
CPO_DEVICE Sums<Acc> meet(const Sums<Acc>* all, int count, Acc c) {
  const int lane = thread_index() % kWarp;
  return meet<kExtras>(lane < count ? all[lane] : Sums<Acc>::none(), c);
}

// The sums of the block, in every thread. `slots` are kThreads / kWarp in shared memory.
template <int kThreads, bool kExtras, typename Acc>
CPO_DEVICE Sums<Acc> meet_block(Sums<Acc> a, Acc c, Sums<Acc>* slots) {
  a = meet<kExtras>(a, c);
  if (thread_index() % kWarp == 0) slots[thread_index() / kWarp] = a;
  sync_block();
  return meet<kExtras>(slots, kThreads / kWarp, c);
}

// The sums of the cluster, in every thread. Each block writes its own to all others, into `slots` [cluster size] of
// their shared memory. Those must have started (the kernel begins with cluster_arrive_relaxed). No block reads from
// another, so each may exit at any time.
template <bool kExtras, typename Acc>
CPO_DEVICE Sums<Acc> meet_cluster(Sums<Acc> a, Acc c, Sums<Acc>* slots) {
  cluster_wait();
  if (thread_index() < cluster_size()) *cluster_shared(slots + cluster_rank(), thread_index()) = a;
  cluster_arrive();
  cluster_wait();
  return meet<kExtras>(slots, cluster_size(), c);
}

// Replaces the `stored` y of a column, which was rounded to the dtype of the logits, by `y`. The sums become relative
// to y if that is most of them: if it is the only term, their logarithm is 0, whatever they were before.
template <bool kExtras, typename Acc>
CPO_DEVICE void replace(Sums<Acc>& a, Acc stored, Acc y, Acc c) {
  const Acc old = shift_of(a.top, c), t_stored = fma(stored, c, -old), power_stored = exp_unit(t_stored);
  a.sum -= power_stored;
  if (kExtras) {
    if (power_stored > 0) a.sum_t = fma(-power_stored, t_stored, a.sum_t);
    a.sum_sq = fmax(fma(-power_stored, power_stored, a.sum_sq), Acc(0));
    if (stored > -Acc(INFINITY)) a.sum_y += y - stored;
  }
  if (a.sum <= 0) a = {-Acc(INFINITY), 0, 0, 0, a.sum_y};
  if (exp_unit(fma(y, c, -old)) >= a.sum) a.sum *= raise<kExtras>(a, y, c);
  const Acc t = fma(y, c, -shift_of(a.top, c)), power = exp_unit(t);
  a.sum += power;
  if (kExtras) {
    if (power > 0) a.sum_t = fma(power, t, a.sum_t);
    a.sum_sq = fma(power, power, a.sum_sq);
  }
}

}  // namespace cpo::cuda
