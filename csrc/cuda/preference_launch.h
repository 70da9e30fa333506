// The host's side of preference: the list of losses and the launches. No torch here: tests/host_cuda runs it too.
#pragma once

#include <algorithm>

#include "aot_rank.cuh"
#include "preference.cuh"

namespace cpo::cuda {

constexpr int64_t kOrderWords = 6;  // 64-bit words of an AotOrder for each pair
inline AotOrder order_in(int64_t* words, int64_t num_pairs) {
  return {words, reinterpret_cast<double*>(words + 2 * num_pairs), words + 4 * num_pairs, words + 5 * num_pairs};
}

inline bool lists(const PreferenceInput& in, int type) {
  return std::find(in.loss_types, in.loss_types + in.num_losses, type) != in.loss_types + in.num_losses;
}

// Sets the losses and what depends on them. Each type appears once; if it is listed twice, its weights are added.
inline void set_losses(PreferenceInput& in, const int64_t* types, const double* weights, size_t count) {
  in.num_losses = 0;
  bool reference_free = true, averaged = false, nll = false;
  for (size_t i = 0; i < count; ++i) {
    const int type = int(types[i]);
    const int j = int(std::find(in.loss_types, in.loss_types + in.num_losses, type) - in.loss_types);
    in.loss_weights[j] = weights[i] + (j < in.num_losses ? in.loss_weights[j] : 0.0);
    in.loss_types[j] = type;
    in.num_losses = std::max(in.num_losses, j + 1);
    reference_free = reference_free && is_reference_free(type);
    averaged = averaged || is_averaged(type);
    nll = nll || has_nll(type, in.options);
  }
  in.reward = !reference_free ? Reward::kRatio : averaged ? Reward::kMean : Reward::kSum;
  if (in.scores.data == nullptr && in.divisor < 0.0) in.divisor = double(in.num_pairs);  // no pair is a tie
  if (!nll) in.chosen_tokens = 1.0;                                                      // not used: not counted
}

constexpr int64_t kManySequences = 4096;  // 128 blocks of 32 rows, about one per multiprocessor

template <int kThreads = 256>
void launch_preference(const PreferenceInput& in, const PreferenceOutput& out, void* stream) {
  const int64_t tiles = (in.num_pairs + kThreads - 1) / kThreads;
  for (int type : {kAot, kAotUnpaired}) {
    if (tiles == 0 || !lists(in, type)) continue;
    const LaunchShape shape{tiles, kThreads, 1, kThreads * int(sizeof(AotPair)), stream};
    launch("preference", shape, aot_rank_kernel<kThreads>, in, type == kAotUnpaired);
  }
  constexpr int kFewRows = kThreads / kParts;
  const int rows = in.num_sequences <= kManySequences ? kFewRows : 32 * kFewRows;
  const int64_t grid = std::max({int64_t(1), tiles, (in.num_sequences + rows - 1) / rows});
  const int shared_bytes = int(sizeof(PreferenceShared<kThreads>)) + (rows - 1) * int(sizeof(double));
  const LaunchShape shape{grid, kThreads, 1, shared_bytes, stream};
  launch("preference", shape, preference_kernel<kThreads>, in, out, rows);
}

}  // namespace cpo::cuda
