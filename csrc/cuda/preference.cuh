// preference: which response is chosen, the loss of every pair and its gradient, in one launch.
//
// A block owns a tile of pairs, one per thread, and `rows` sequences. It writes the losses and metrics of its pairs and
// the gradient of its sequences; block 0 sums the loss. It computes whatever else it needs itself: it reads all pairs,
// and computes the loss of those that contain one of its sequences. So blocks do not communicate, every sum has a fixed
// order, and the launch does not depend on the data.
//
// aot and aot_unpaired sort over the batch: one launch before this one ranks the pairs (aot_rank.cuh).
#pragma once

#include <math.h>

#include "../loss_formulas.h"
#include "block_sum.h"
#include "float_arrays.h"

namespace cpo::cuda {

// The factor of beta in the reported rewards: L - ref, or, if no loss type needs a reference, L or L / n.
enum class Reward { kRatio, kSum, kMean };

// The order of the n non-tied pairs, for one loss type. Null if not requested.
struct AotOrder {
  int64_t* rank;   // [2, P]: the rank of the upper and the lower value of a pair
  double* sorted;  // [2, P]: the upper and the lower value at a rank
  int64_t* upper;  // [P]: the pair of the upper value at a rank
  int64_t* live;   // [P]: the first n are the non-tied pairs
};

struct PreferenceInput {
  FloatArray seq_logps, ref_logps;                   // [S]
  const int64_t* lengths;                            // [S]
  const int64_t* pairs;                              // [P, 2]
  FloatArray scores, conditions;                     // [S, K], [P, K]
  FloatArray objectives;                             // [2, K]: weights, strengths
  FloatArray pair_weights, pair_betas;               // [P]
  FloatArray margins;                                // [S]
  int64_t num_pairs, num_sequences, num_objectives;  // P, S, K
  LossOptions options;
  double divisor, chosen_tokens;  // below 0: counted here
  int num_losses;
  int loss_types[kNumLossTypes];
  double loss_weights[kNumLossTypes];
  Reward reward;
  AotOrder aot, aot_unpaired;
};

struct PreferenceOutput {
  FloatOutput loss, losses, grad;                     // [], [P], [S]
  FloatOutput chosen_rewards, rejected_rewards, gap;  // [P]
  int8_t* order;                                      // [P]
  int64_t* counts;                                    // [3]
};

// ---- one sequence, one pair -----------------------------------------------------------------------------------------

CPO_DEVICE bool is_sequence(const PreferenceInput& in, int64_t s) { return s >= 0 && s < in.num_sequences; }

// 0 if the array is not given; NaN for a sequence that does not exist.
CPO_DEVICE double of_sequence(const PreferenceInput& in, const FloatArray& values, int64_t s) {
  if (!values.given()) return 0.0;
  return is_sequence(in, s) ? values.at(s) : NAN;
}

CPO_DEVICE int64_t tokens_of(const PreferenceInput& in, int64_t s) {
  return in.lengths != nullptr && is_sequence(in, s) ? in.lengths[s] : 0;
}
CPO_DEVICE double length_of(const PreferenceInput& in, int64_t s) {
  const int64_t tokens = tokens_of(in, s);
  return tokens > 1 ? double(tokens) : 1.0;
}
CPO_DEVICE double beta_of(const PreferenceInput& in, int64_t p) {
  return in.pair_betas.given() ? in.pair_betas.at(p) : in.options.beta;
}
CPO_DEVICE double weight_of(const PreferenceInput& in, int64_t p) {
  return in.pair_weights.given() ? in.pair_weights.at(p) : 1.0;
}

constexpr int kObjectives = 4;  // objectives whose loads are in flight together

// Delta R of sequence `first` minus `second`: NaN where no objective of positive weight is rated on both sides,
// infinite without scores.
CPO_DEVICE double value_gap(const PreferenceInput& in, int64_t p, int64_t first, int64_t second) {
  if (!in.scores.given()) return INFINITY;
  const int64_t all = in.num_objectives;
  double gain = 0.0, total = 0.0;
  for (int64_t k = 0; k < all; k += kObjectives) {
    const int count = all - k < kObjectives ? int(all - k) : kObjectives;
    double a[kObjectives], b[kObjectives], c[kObjectives], weight[kObjectives], strength[kObjectives];
    in.objectives.read(k, count, weight);
    in.objectives.read(all + k, count, strength);
    in.scores.read(first * all + k, count, a);
    in.scores.read(second * all + k, count, b);
    if (in.conditions.given()) in.conditions.read(p * all + k, count, c);
#pragma unroll
    for (int i = 0; i < kObjectives; ++i) {
      const bool rated = i < count && a[i] == a[i] && b[i] == b[i] && weight[i] > 0.0;
      const double condition = in.conditions.given() ? c[i] : NAN;
      // Not contracted into an fma: two gains that cancel must give exactly 0.
      gain = add_rn(gain, rated ? weighted_gain(a[i], b[i], condition, weight[i], strength[i]) : 0.0);
      total += rated ? weight[i] : 0.0;
    }
  }
  return total > 0.0 ? gain / total : NAN;
}

struct Oriented {
  int64_t chosen, rejected;
  double gap;  // Delta R of the first minus the second
  int sign;    // +1: the first is chosen, -1: the second, 0: a tie
};

// A pair with a sequence that does not exist is not a tie: its log-probs, and so its loss, are NaN.
CPO_DEVICE Oriented orient(const PreferenceInput& in, int64_t p) {
  const int64_t first = in.pairs[2 * p], second = in.pairs[2 * p + 1];
  const double gap = is_sequence(in, first) && is_sequence(in, second) ? value_gap(in, p, first, second) : INFINITY;
  const int sign = fabs(gap) > in.options.tie_margin ? (gap < 0.0 ? -1 : 1) : 0;
  return {sign < 0 ? second : first, sign < 0 ? first : second, gap, sign};
}

// ---- aot ------------------------------------------------------------------------------------------------------------

// The k-th loss compares the k-th upper with the k-th lower value; it belongs to the pair of the upper one.
CPO_DEVICE ValueAndSlope aot_at(const PreferenceInput& in, const AotOrder& order, int64_t k) {
  const double upper = order.sorted[k], lower = order.sorted[in.num_pairs + k];
  const ValueAndSlope term = aot_loss(upper, lower, beta_of(in, order.live[k]), in.options);
  const double weight = weight_of(in, order.upper[k]);
  return {weight * term.value, weight * term.slope};
}

// The loss at pair p. The gradient goes to the responses of the two sorted values; in aot both belong to the pair of
// the upper one.
CPO_DEVICE LossTerm aot_term(const PreferenceInput& in, const AotOrder& order, bool unpaired, int64_t p) {
  const ValueAndSlope upper = aot_at(in, order, order.rank[p]);
  const double lower_slope = unpaired ? aot_at(in, order, order.rank[in.num_pairs + p]).slope : upper.slope;
  return {upper.value, upper.slope, -lower_slope};
}

// ---- the loss of a pair ---------------------------------------------------------------------------------------------

CPO_DEVICE LossPair loss_pair(const PreferenceInput& in, int64_t p, const Oriented& who, double nll_scale) {
  return {of_sequence(in, in.seq_logps, who.chosen),
          of_sequence(in, in.seq_logps, who.rejected),
          of_sequence(in, in.ref_logps, who.chosen),
          of_sequence(in, in.ref_logps, who.rejected),
          length_of(in, who.chosen),
          length_of(in, who.rejected),
          of_sequence(in, in.margins, who.chosen),
          of_sequence(in, in.margins, who.rejected),
          beta_of(in, p),
          fabs(who.gap),
          nll_scale};
}

// The weighted sum of all listed losses for a non-tied pair.
CPO_DEVICE LossTerm weighted_terms(const PreferenceInput& in, int64_t p, const LossPair& pair) {
  LossTerm sum{0.0, 0.0, 0.0};
  for (int j = 0; j < in.num_losses; ++j) {
    const int type = in.loss_types[j];
    double weight = in.loss_weights[j];
    LossTerm term;
    if (type == kAot || type == kAotUnpaired) {
      term = aot_term(in, type == kAot ? in.aot : in.aot_unpaired, type == kAotUnpaired, p);
    } else {
      term = pair_loss(type, pair, in.options);
      weight *= weight_of(in, p);
    }
    sum.loss += weight * term.loss;
    sum.chosen += weight * term.chosen;
    sum.rejected += weight * term.rejected;
  }
  return sum;
}

CPO_DEVICE double reward(const PreferenceInput& in, double beta, double logp, double ref, double length) {
  if (in.reward == Reward::kRatio) return beta * (logp - ref);
  return in.reward == Reward::kSum ? beta * logp : beta * logp / length;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

constexpr int kParts = 8;  // threads that sum one row of the gradient

template <int kThreads>
struct PreferenceShared {
  double to_first[kThreads], to_second[kThreads];  // d loss / d L of the pairs of a tile
  int first[kThreads], second[kThreads];           // their rows in this block, -1 for another block's
  double scratch[kThreads / kWarp];
  double sums[1];  // [rows]
};

struct Divisors {
  double pairs;      // of the loss
  double nll_scale;  // of L_w in an NLL term
};

// The numbers of non-tied pairs and of tokens of their chosen responses; every block counts them if they are not given.
template <int kThreads>
CPO_DEVICE Divisors divisors(const PreferenceInput& in, void* scratch) {
  double pairs = in.divisor, tokens = in.chosen_tokens;
  if (pairs < 0.0 || tokens < 0.0) {
    int64_t live = 0, chosen = 0;
    for (int64_t p = thread_index(); p < in.num_pairs; p += kThreads) {
      const Oriented who = orient(in, p);
      live += who.sign != 0;
      chosen += who.sign != 0 ? tokens_of(in, who.chosen) : 0;
    }
    live = block_sum<kThreads>(live, scratch);
    chosen = block_sum<kThreads>(chosen, scratch);
    if (pairs < 0.0) pairs = double(live);
    if (tokens < 0.0) tokens = double(chosen);
  }
  if (pairs == 0.0) pairs = 1.0;  // no pairs: loss and gradient are 0
  return {pairs, pairs / (tokens > 1.0 ? tokens : 1.0)};
}

// The row of a sequence within this block, counted from its first sequence; -1 if it belongs to another block.
CPO_DEVICE int row_of(int64_t sequence, int64_t base, int rows) {
  return sequence >= base && sequence < base + rows ? int(sequence - base) : -1;
}

// sums[row] += the terms of a tile's pairs for row. kParts neighbouring threads share a row.
template <int kThreads>
CPO_DEVICE void add_to_rows(PreferenceShared<kThreads>& tile, int rows) {
  const int part = thread_index() % kParts;
  for (int row = thread_index() / kParts; row < rows; row += kThreads / kParts) {
    double sum = 0.0;
    for (int i = part; i < kThreads; i += kParts) {
      sum += tile.first[i] == row ? tile.to_first[i] : 0.0;
      sum += tile.second[i] == row ? tile.to_second[i] : 0.0;
    }
#pragma unroll
    for (int mask = kParts / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (part == 0) tile.sums[row] += sum;
  }
}

template <int kThreads>
CPO_KERNEL(kThreads, 1)
preference_kernel(const PreferenceInput in, const PreferenceOutput out, int rows) {
  PreferenceShared<kThreads>& tile = *shared<PreferenceShared<kThreads>>();
  const int thread = thread_index();
  const int64_t block = block_index(), base = block * rows;
  for (int row = thread; row < rows; row += kThreads) tile.sums[row] = 0.0;
  const Divisors divisor = divisors<kThreads>(in, tile.scratch);

  double loss = 0.0;
  int64_t live = 0, unrated = 0;
  for (int64_t index = 0; index * kThreads < in.num_pairs; ++index) {
    const int64_t p = index * kThreads + thread;
    const bool is_pair = p < in.num_pairs;
    const int first = is_pair ? row_of(in.pairs[2 * p], base, rows) : -1;
    const int second = is_pair ? row_of(in.pairs[2 * p + 1], base, rows) : -1;
    const bool touches = first >= 0 || second >= 0;
    const bool any_touches = block_sum<kThreads>(int(touches), tile.scratch) > 0;
    if (!any_touches && index != block && block != 0) continue;

    LossTerm term{0.0, 0.0, 0.0};
    int sign = 0;
    if (is_pair && (touches || index == block || block == 0)) {
      const Oriented who = orient(in, p);
      const LossPair pair = loss_pair(in, p, who, divisor.nll_scale);
      sign = who.sign;
      if (sign != 0) term = weighted_terms(in, p, pair);  // terms of a tie may be NaN
      loss += term.loss;
      live += sign != 0;
      unrated += who.gap != who.gap;
      if (index == block) {
        out.losses.set(p, term.loss);
        out.chosen_rewards.set(p, reward(in, pair.beta, pair.chosen, pair.chosen_ref, pair.chosen_length));
        out.rejected_rewards.set(p, reward(in, pair.beta, pair.rejected, pair.rejected_ref, pair.rejected_length));
        out.gap.set(p, who.gap);
        out.order[p] = int8_t(sign);
      }
    }
    if (!any_touches) continue;
    tile.first[thread] = first;
    tile.second[thread] = second;
    tile.to_first[thread] = sign < 0 ? term.rejected : term.chosen;
    tile.to_second[thread] = sign < 0 ? term.chosen : term.rejected;
    sync_block();
    add_to_rows<kThreads>(tile, rows);
    sync_block();
  }

  sync_block();
  for (int row = thread; row < rows; row += kThreads) {
    if (base + row < in.num_sequences) out.grad.set(base + row, tile.sums[row] / divisor.pairs);
  }
  if (block != 0) return;
  loss = block_sum<kThreads>(loss, tile.scratch);
  live = block_sum<kThreads>(live, tile.scratch);
  unrated = block_sum<kThreads>(unrated, tile.scratch);
  if (thread == 0) {
    out.loss.set(0, loss / divisor.pairs);
    out.counts[0] = live;
    out.counts[1] = in.num_pairs - live;
    out.counts[2] = unrated;
  }
}

}  // namespace cpo::cuda
