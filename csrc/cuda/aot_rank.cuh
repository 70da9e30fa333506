// The order of the pairs for aot and aot_unpaired. A pair's rank is the number of pairs that stand before it: P^2
// comparisons of integers, no sort, no workspace, the same order whatever the launch, equal values as they come.
#pragma once

#include "preference.cuh"

namespace cpo::cuda {

constexpr int64_t kTieKey = INT64_MAX;  // of a tie, which stands in no order

// Integers in the order of the numbers: the two zeros alike, every NaN last.
CPO_DEVICE int64_t sort_key(double x) {
  if (x != x) return kTieKey - 1;
  x = add_rn(x, 0.0);  // -0 becomes 0
  const int64_t bits = int64_t(uint64_t(high_bits_of(x)) << 32 | low_bits_of(x));
  return bits < 0 ? bits ^ INT64_MAX : bits;
}

struct AotKeys {
  int64_t high, low;
};
CPO_DEVICE AotKeys aot_keys(const PreferenceInput& in, int64_t p, bool unpaired) {
  const Oriented who = orient(in, p);
  if (who.sign == 0) return {kTieKey, kTieKey};
  const AotValues values = aot_values(in, who, unpaired);
  return {sort_key(values.high), sort_key(values.low)};
}

// A block ranks the pairs of one tile, a pair for each thread, against all pairs, tile by tile.
template <int kThreads>
CPO_KERNEL(kThreads, 1)
aot_rank_kernel(const PreferenceInput in, bool unpaired) {
  AotKeys* tile = shared<AotKeys>();  // [kThreads]
  const AotRanks& out = unpaired ? in.aot_unpaired : in.aot;
  const int64_t p = block_index() * kThreads + thread_index();
  const AotKeys own = p < in.num_pairs ? aot_keys(in, p, unpaired) : AotKeys{kTieKey, kTieKey};
  int64_t high = 0, low = 0, live = 0;
  for (int64_t begin = 0; begin < in.num_pairs; begin += kThreads) {
    const int64_t q = begin + thread_index();
    tile[thread_index()] = q < in.num_pairs ? aot_keys(in, q, unpaired) : AotKeys{kTieKey, kTieKey};
    sync_block();
    for (int i = 0; i < kThreads; ++i) {
      const AotKeys other = tile[i];
      const bool before = begin + i < p;
      high += other.high < own.high || (other.high == own.high && before);
      low += other.low < own.low || (other.low == own.low && before);
      live += other.high != kTieKey && before;
    }
    sync_block();
  }
  if (own.high == kTieKey) return;
  out.rank[p] = high;
  out.rank[in.num_pairs + p] = low;
  out.at[high] = p;
  out.at[in.num_pairs + low] = p;
  out.live[live] = p;
}

}  // namespace cpo::cuda
