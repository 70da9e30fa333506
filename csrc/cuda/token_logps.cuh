// Token log-probs over logits [rows, width]: the kernels. A row takes one sweep of reads and, for a gradient, one of
// writes; nothing else accesses device memory.
//
//   scan     fwd: sums of a row, or of a piece of it if there are too few rows to fill the GPU
//   combine  combines the pieces of a row
//   write    bwd_ from lse and the incoming gradient, or fused_ from the results of combine
//   fused    scan and write of a row in one kernel, by one block or the blocks of a cluster. The last chunk that a
//            thread reads stays in its registers: rows of up to `cluster` chunks are read once. In longer rows the
//            earlier chunks are read again, from the L2 cache while it holds them.
#pragma once

#include "row_gradient.h"

namespace cpo::cuda {

// Registers for 1024 threads on a multiprocessor, 64 each; float64 has 128.
template <typename T>
constexpr int blocks_for(int threads) {
  return (sizeof(T) == 8 ? 512 : 1024) / threads;
}

// Writes the outputs if pieces = 1, else only sums [rows, pieces].
template <typename T, int kThreads, bool kSoftcap, bool kExtras, bool kAnchored>
CPO_KERNEL(kThreads, blocks_for<T>(kThreads))
scan_kernel(Problem<T> p, Outputs<AccOf<T>> out, int pieces, Sums<AccOf<T>>* sums) {
  using Acc = AccOf<T>;
  const int64_t i = block_index() / pieces, label = p.labels[i];
  const int piece = int(block_index() % pieces);
  if (label == p.ignore_index) {
    if (pieces == 1 && thread_index() == 0) store_ignored<kExtras>(out, i, p.rows);
    return;
  }
  const Row<T> row(p.logits + i * p.stride, p.columns);
  const Part<kThreads, kStreamed> part(piece, pieces);
  const Acc x_label = stored_logit(row.start, column_of(p, label));
  Pack v[kStreamed];
  const Acc offset = offset_of<kSoftcap, kAnchored>(p, i);
  Sums<Acc> a = scan<kSoftcap, kExtras, kAnchored>(row, part, p, offset, v);
  a = meet_block<kThreads, kExtras>(a, p.c, shared<Sums<Acc>>());
  if (thread_index() != 0) return;
  if (pieces > 1) {
    sums[block_index()] = a;
  } else {
    const Acc stored = y_of<kSoftcap, kAnchored>(p, x_label, offset);
    const Label<Acc> at = label_of<kSoftcap, kExtras, kAnchored>(a, stored, offset, i, p);
    store_outputs<kSoftcap, kExtras, kAnchored>(out, i, a, softmax_of(a, at.y, p), at, p);
  }
}

// One warp per row. softmaxes [rows]: for write_kernel, or null.
template <typename T, bool kSoftcap, bool kExtras, bool kAnchored>
CPO_KERNEL(kWarp, 1)
combine_kernel(Problem<T> p, Outputs<AccOf<T>> out, int pieces, const Sums<AccOf<T>>* sums,
               Softmax<AccOf<T>>* softmaxes) {
  using Acc = AccOf<T>;
  const int64_t i = block_index(), label = p.labels[i];
  if (label == p.ignore_index) {
    if (thread_index() == 0) store_ignored<kExtras>(out, i, p.rows);
    return;
  }
  const Acc x_label = stored_logit(p.logits + i * p.stride, column_of(p, label));
  const Acc offset = offset_of<kSoftcap, kAnchored>(p, i), stored = y_of<kSoftcap, kAnchored>(p, x_label, offset);
  Sums<Acc> a = meet<kExtras>(sums + i * pieces, pieces, p.c);
  if (thread_index() != 0) return;
  const Label<Acc> at = label_of<kSoftcap, kExtras, kAnchored>(a, stored, offset, i, p);
  const Softmax<Acc> s = softmax_of(a, at.y, p);
  store_outputs<kSoftcap, kExtras, kAnchored>(out, i, a, s, at, p);
  if (softmaxes) softmaxes[i] = s;
}

// Takes softmaxes [rows], with grad = 1, or, if they are null, lse and grads [rows]. entropies [2, rows]: see Upstream;
// may be null.
template <typename T, int kThreads, bool kSoftcap, bool kAnchored, bool kEntropy>
CPO_KERNEL(kThreads, blocks_for<T>(kThreads))
write_kernel(Problem<T> p, int pieces, const Softmax<AccOf<T>>* softmaxes, const AccOf<T>* lse, const AccOf<T>* grads,
             const AccOf<T>* entropies) {
  using Acc = AccOf<T>;
  const int64_t i = block_index() / pieces, label = p.labels[i];
  const Row<T> row(p.logits + i * p.stride, p.columns);
  constexpr int kLoads = kSoftcap && kEntropy ? kStreamed - 1 : kStreamed;  // 4 would spill on sm_100
  const Part<kThreads, kLoads> part(int(block_index() % pieces), pieces);
  if (label == p.ignore_index) return part.clear(Row<T>(row.start, p.width));
  const int column = column_of(p, label);
  Acc x_label = part.owns(row, column) ? widened(row.start[column]) : Acc(0);
  if (kAnchored && p.anchors) x_label = exact_logit(p, i);
  Softmax<Acc> s = softmaxes ? softmaxes[i] : softmax_of_lse(lse[i], lacking<kSoftcap, kAnchored>(p, i), p);
  if (column < 0) s.factor = Acc(NAN);
  Upstream<Acc> grad{softmaxes ? Acc(1) : grads[i], 0, 0};
  if (kEntropy) grad = {grad.logp, entropies[i], entropies[p.rows + i]};
  Pack v[kLoads];
  const Acc offset = offset_of<kSoftcap, kAnchored>(p, i);
  write<kSoftcap, kAnchored, kEntropy>(row, part, p, column, x_label, offset, s, grad, v, false);
}

template <typename T, int kThreads, bool kSoftcap, bool kExtras, bool kAnchored>
CPO_KERNEL(kThreads, blocks_for<T>(kThreads))
fused_kernel(Problem<T> p, Outputs<AccOf<T>> out) {
  using Acc = AccOf<T>;
  const int blocks = cluster_size();
  const int64_t i = block_index() / blocks, label = p.labels[i];
  const Row<T> row(p.logits + i * p.stride, p.columns);
  constexpr int kHeld = kSoftcap || kExtras ? kHeldBeside : kHeldPlain;
  const Part<kThreads, kHeld> part(cluster_rank(), blocks);
  if (label == p.ignore_index) {
    if (part.first == 0) store_ignored<kExtras>(out, i, p.rows);
    return part.clear(Row<T>(row.start, p.width));
  }
  if (blocks > 1) cluster_arrive_relaxed();
  const int column = column_of(p, label);
  Acc x_label = stored_logit(row.start, column);
  Pack v[kHeld];
  const Acc offset = offset_of<kSoftcap, kAnchored>(p, i);
  Sums<Acc> a = scan<kSoftcap, kExtras, kAnchored>(row, part, p, offset, v);
  Sums<Acc>* slots = shared<Sums<Acc>>();
  a = meet_block<kThreads, kExtras>(a, p.c, slots);
  if (blocks > 1) a = meet_cluster<kExtras>(a, p.c, slots + kThreads / kWarp);
  const Acc stored = y_of<kSoftcap, kAnchored>(p, x_label, offset);
  const Label<Acc> at = label_of<kSoftcap, kExtras, kAnchored>(a, stored, offset, i, p);
  const Softmax<Acc> s = softmax_of(a, at.y, p);
  if (part.first == 0) store_outputs<kSoftcap, kExtras, kAnchored>(out, i, a, s, at, p);
  if (kAnchored) x_label = exact_logit(p, i);
  write<kSoftcap, kAnchored, false>(row, part, p, column, x_label, offset, s, Upstream<Acc>{1, 0, 0}, v, true);
}

}  // namespace cpo::cuda
