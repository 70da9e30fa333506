// Which kernels run for which problem, on how many blocks. The numbers are derived, not measured, as stated at each.
#pragma once

#include <algorithm>

#include "token_logps.cuh"

namespace cpo::cuda {

// Two blocks of 512 threads on a multiprocessor hold 128 KB of logits in registers. To copy at full rate, about 26 KB
// must be in flight (4.3 TB/s over 132 multiprocessors at 0.8 us), so one may wait at a barrier while the other reads.
constexpr int kTokenThreads = 512;
constexpr int kResident = 2;       // blocks per multiprocessor from which on rows are not split
constexpr int kMaxPieces = kWarp;  // one warp combines them
constexpr int kMaxCluster = 8;     // cluster size that every device with clusters supports

template <typename T>
Problem<T> problem_of(T* logits, const int64_t* labels, int64_t rows, int64_t stride, int64_t width, int64_t columns,
                      int64_t ignore_index, double scale, double softcap, const AccOf<T>* anchors) {
  using Acc = AccOf<T>;
  const double nat = softcap > 0 ? softcap : scale;
  return {logits,
          labels,
          rows,
          stride,
          ignore_index,
          int(width),
          int(columns),
          Acc(nat),
          Acc(sizeof(Acc) == 4 ? nat * 1.4426950408889634 : nat),
          Acc(softcap > 0 ? scale / softcap : 0.0),
          Acc(scale),
          anchors};
}

struct Plan {
  int pieces;   // of a row, for scan and write
  int cluster;  // blocks of a row, for fused; 0: the row is split, and fused is not used
};

// Blocks that share a row: enough to fill the GPU, while each thread has at least one vector.
template <int kThreads>
int pieces_of(int64_t rows, int64_t vectors, const DeviceInfo& device) {
  const int64_t wanted = (int64_t(kResident) * device.multiprocessors + rows - 1) / rows;
  return int(std::max<int64_t>(1, std::min({wanted, vectors / kThreads, int64_t(kMaxPieces)})));
}

template <int kThreads>
Plan plan_of(int64_t rows, int64_t vectors, int held, const DeviceInfo& device) {
  const int64_t chunk = kThreads * held;
  const int pieces = pieces_of<kThreads>(rows, vectors, device);
  int cluster = 1;
  while (device.clusters && cluster < kMaxCluster && cluster * chunk < vectors) cluster *= 2;
  const bool fills = rows * cluster >= device.multiprocessors || cluster >= pieces;
  return {pieces, fills ? cluster : 0};
}

template <int kThreads, typename T>
Plan plan_of(const Problem<T>& p, bool softcap, bool extras, const DeviceInfo& device) {
  const int held = softcap || extras ? kHeldBeside : kHeldPlain;
  return plan_of<kThreads>(p.rows, p.columns / Number<T>::kPer, held, device);
}

// Numbers of the accumulation type that the launches below need in device memory.
template <typename T>
int64_t scratch_size(const Problem<T>& p, const Plan& plan, bool overwrite) {
  using Acc = AccOf<T>;
  constexpr int64_t sums = sizeof(Sums<Acc>) / sizeof(Acc), softmax = sizeof(Softmax<Acc>) / sizeof(Acc);
  const bool split = overwrite ? plan.cluster == 0 : plan.pieces > 1;
  return split ? p.rows * (plan.pieces * sums + softmax) : 0;
}

template <typename T, int kThreads, bool kSoftcap, bool kExtras, bool kAnchored>
void launch_forward(const char* op, const Problem<T>& p, const Outputs<AccOf<T>>& out, bool overwrite, const Plan& plan,
                    AccOf<T>* scratch, void* stream) {
  using Acc = AccOf<T>;
  const auto shape = [&](int64_t blocks, int cluster) {
    return LaunchShape{blocks, kThreads, cluster, (kThreads / kWarp + cluster) * int(sizeof(Sums<Acc>)), stream};
  };
  if (overwrite && plan.cluster > 0) {
    launch(op, shape(p.rows * plan.cluster, plan.cluster), fused_kernel<T, kThreads, kSoftcap, kExtras, kAnchored>, p,
           out);
    return;
  }
  auto* sums = reinterpret_cast<Sums<Acc>*>(scratch);
  auto* softmaxes = reinterpret_cast<Softmax<Acc>*>(sums + p.rows * plan.pieces);
  const LaunchShape split = shape(p.rows * plan.pieces, 1);
  launch(op, split, scan_kernel<T, kThreads, kSoftcap, kExtras, kAnchored>, p, out, plan.pieces, sums);
  if (plan.pieces == 1) return;
  launch(op, {p.rows, kWarp, 1, 0, stream}, combine_kernel<T, kSoftcap, kExtras, kAnchored>, p, out, plan.pieces, sums,
         overwrite ? softmaxes : nullptr);
  if (!overwrite) return;
  const Acc* none = nullptr;
  launch(op, split, write_kernel<T, kThreads, kSoftcap, kAnchored, false>, p, plan.pieces, softmaxes, none, none, none);
}

// token_logps_fwd, and token_logps_fused_ with `overwrite`.
template <int kThreads, typename T>
void token_logps_forward(const char* op, const Problem<T>& p, const Outputs<AccOf<T>>& out, bool overwrite,
                         bool softcap, bool extras, const Plan& plan, AccOf<T>* scratch, void* stream) {
  with_flags([&](auto... on) { launch_forward<T, kThreads, on...>(op, p, out, overwrite, plan, scratch, stream); },
             softcap, extras, p.anchors != nullptr);
}

// Rows with a gradient of the entropy share their kernels, with anchors and without.
template <int kThreads, typename T>
void token_logps_backward(const char* op, const Problem<T>& p, const AccOf<T>* lse, const AccOf<T>* grads,
                          const AccOf<T>* entropies, bool softcap, const Plan& plan, void* stream) {
  const LaunchShape shape{p.rows * plan.pieces, kThreads, 1, 0, stream};
  const Softmax<AccOf<T>>* none = nullptr;
  const auto run = [&](auto capped, auto anchored, auto entropy) {
    constexpr bool kAnchored = anchored || entropy;
    launch(op, shape, write_kernel<T, kThreads, capped, kAnchored, entropy>, p, plan.pieces, none, lse, grads,
           entropies);
  };
  with_flags(run, softcap, p.anchors != nullptr, entropies != nullptr);
}

}  // namespace cpo::cuda
