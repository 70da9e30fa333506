// The order of the pairs for aot and aot_unpaired. A pair's rank is the number of pairs before it: P^2 comparisons of
// integers, no sort, no workspace. The order is stable and does not depend on the launch.
#pragma once

#include "preference.cuh"

namespace cpo::cuda {

constexpr int64_t kTieKey = INT64_MAX;  // of a tie, which is not ranked

// Integers in the order of the numbers: both zeros are equal, every NaN is last.
CPO_DEVICE int64_t sort_key(double x) {
  if (x != x) return kTieKey - 1;
  x = add_rn(x, 0.0);  // -0 becomes 0
  const int64_t bits = int64_t(uint64_t(high_bits_of(x)) << 32 | low_bits_of(x));
  return bits < 0 ? bits ^ INT64_MAX : bits;
}

// The two values of a pair, each of which is sorted over the pairs. aot: L_w - L_l and ref_w - ref_l; aot_unpaired: r_w
// and r_l.
struct AotValues {
  double high, low;
};
CPO_DEVICE AotValues aot_values(const PreferenceInput& in, const Oriented& who, bool unpaired) {
  const double chosen = of_sequence(in, in.seq_logps, who.chosen);
  const double rejected = of_sequence(in, in.seq_logps, who.rejected);
  const double chosen_ref = of_sequence(in, in.ref_logps, who.chosen);
  const double rejected_ref = of_sequence(in, in.ref_logps, who.rejected);
  if (unpaired) return {chosen - chosen_ref, rejected - rejected_ref};
  return {chosen - rejected, chosen_ref - rejected_ref};
}

struct AotPair {
  AotValues values;
  int64_t high, low;  // their keys
};
CPO_DEVICE AotPair aot_pair(const PreferenceInput& in, int64_t p, bool unpaired) {
  if (p >= in.num_pairs) return {{0.0, 0.0}, kTieKey, kTieKey};
  const Oriented who = orient(in, p);
  const AotValues values = aot_values(in, who, unpaired);
  if (who.sign == 0) return {values, kTieKey, kTieKey};
  return {values, sort_key(values.high), sort_key(values.low)};
}

// A block ranks the pairs of one tile, one per thread, against all pairs, tile by tile.
template <int kThreads>
CPO_KERNEL(kThreads, 1)
aot_rank_kernel(const PreferenceInput in, bool unpaired) {
  AotPair* tile = shared<AotPair>();  // [kThreads]
  const AotOrder& out = unpaired ? in.aot_unpaired : in.aot;
  const int64_t p = block_index() * kThreads + thread_index(), all = in.num_pairs;
  const AotPair own = aot_pair(in, p, unpaired);
  int64_t high = 0, low = 0, live = 0;
  for (int64_t begin = 0; begin < all; begin += kThreads) {
    tile[thread_index()] = aot_pair(in, begin + thread_index(), unpaired);
    sync_block();
    for (int i = 0; i < kThreads; ++i) {
      const bool before = begin + i < p;
      high += tile[i].high < own.high || (tile[i].high == own.high && before);
      low += tile[i].low < own.low || (tile[i].low == own.low && before);
      live += tile[i].high != kTieKey && before;
    }
    sync_block();
  }
  if (own.high == kTieKey) return;
  out.rank[p] = high;
  out.rank[all + p] = low;
  out.sorted[high] = own.values.high;
  out.sorted[all + low] = own.values.low;
  out.upper[high] = p;
  out.live[live] = p;
}

}  // namespace cpo::cuda
