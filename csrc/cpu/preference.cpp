// preference on the CPU: which response is chosen, the loss of every pair and its gradient, in float64 and in pair
// order. The formulas are in ../loss_formulas.h. Single-threaded: a pair takes about 0.1 us per loss type.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "../common.h"
#include "../loss_formulas.h"

namespace cpo {
namespace {

constexpr const char* kOp = "preference";

// A float tensor as doubles; empty if it is not given.
std::vector<double> read_doubles(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Double || type == ScalarType::Float, kOp, ": ", name, " must be float64 or float32, got ",
        name_of(type));
  const Tensor packed = dense(tensor);
  std::vector<double> values(packed.numel());
  if (values.empty()) return values;
  if (type == ScalarType::Double) {
    std::copy_n(data_of<double>(packed), values.size(), values.begin());
  } else {
    std::copy_n(data_of<float>(packed), values.size(), values.begin());
  }
  return values;
}

std::vector<double> read_vector(const char* name, const Tensor& tensor, int64_t size) {
  if (given(tensor)) check_vector(name, tensor, size);
  return read_doubles(name, tensor);
}

std::vector<double> read_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  if (given(tensor)) check_matrix(name, tensor, rows, columns);
  return read_doubles(name, tensor);
}

Tensor write_doubles(const Tensor& like, const std::vector<double>& values) {
  Tensor out = new_vector(like, int64_t(values.size()), like.scalar_type());
  if (like.scalar_type() == ScalarType::Double) {
    std::copy(values.begin(), values.end(), mutable_data_of<double>(out));
  } else {
    std::transform(values.begin(), values.end(), mutable_data_of<float>(out), [](double x) { return float(x); });
  }
  return out;
}

struct Batch {
  int64_t sequences, num_pairs, objectives_count;
  std::vector<double> logps, ref, scores, conditions, objectives, weights, betas, margins;
  std::vector<int64_t> lengths, pairs;
  std::vector<int64_t> types;
  std::vector<double> type_weights;
  LossOptions options;

  double beta(int64_t p) const { return betas.empty() ? options.beta : betas[p]; }
  double weight(int64_t p) const { return weights.empty() ? 1.0 : weights[p]; }
  double ref_of(int64_t s) const { return ref.empty() ? 0.0 : ref[s]; }
  double length_of(int64_t s) const { return lengths.empty() ? 1.0 : double(std::max<int64_t>(1, lengths[s])); }
};

// Delta R of the first response minus the second: NaN where no objective is rated on both sides.
double value_gap(const Batch& b, int64_t pair) {
  if (b.scores.empty()) return std::numeric_limits<double>::infinity();
  const int64_t count = b.objectives_count;
  const double* first = &b.scores[b.pairs[2 * pair] * count];
  const double* second = &b.scores[b.pairs[2 * pair + 1] * count];
  double gain = 0.0, total = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    const double weight = b.objectives[k];
    if (std::isnan(first[k]) || std::isnan(second[k]) || !(weight > 0.0)) continue;
    const double condition = b.conditions.empty() ? NAN : b.conditions[pair * count + k];
    gain += weighted_gain(first[k], second[k], condition, weight, b.objectives[count + k]);
    total += weight;
  }
  return gain / total;  // 0 / 0 = NaN
}

struct Result {
  std::vector<double> losses, grad, chosen_rewards, rejected_rewards, gaps;
  std::vector<int8_t> order;
  int64_t live = 0, unrated = 0;
  double loss = 0.0;
};

int64_t chosen_of(const Batch& b, const Result& r, int64_t pair) { return b.pairs[2 * pair + (r.order[pair] < 0)]; }
int64_t rejected_of(const Batch& b, const Result& r, int64_t pair) { return b.pairs[2 * pair + !(r.order[pair] < 0)]; }

// Positions of `values` in ascending order (stable), NaN last.
std::vector<int64_t> stable_order(const std::vector<double>& values) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return std::isnan(values[j]) ? !std::isnan(values[i]) : values[i] < values[j];
  });
  return order;
}

// aot: sorts L_w - L_l against ref_w - ref_l. aot_unpaired: sorts r_w against r_l. The k-th loss belongs to the pair of
// the k-th upper value; its gradient goes to the responses that have the two sorted values.
void add_aot(const Batch& b, bool unpaired, double type_weight, double divisor, Result& r) {
  std::vector<int64_t> live;
  for (int64_t p = 0; p < b.num_pairs; ++p) {
    if (r.order[p] != 0) live.push_back(p);
  }
  std::vector<double> high(live.size()), low(live.size());
  for (size_t i = 0; i < live.size(); ++i) {
    const int64_t w = chosen_of(b, r, live[i]), l = rejected_of(b, r, live[i]);
    high[i] = unpaired ? b.logps[w] - b.ref_of(w) : b.logps[w] - b.logps[l];
    low[i] = unpaired ? b.logps[l] - b.ref_of(l) : b.ref_of(w) - b.ref_of(l);
  }
  const std::vector<int64_t> high_order = stable_order(high), low_order = stable_order(low);
  for (size_t k = 0; k < live.size(); ++k) {
    const int64_t pair = live[high_order[k]];
    const ValueAndSlope term = aot_loss(high[high_order[k]], low[low_order[k]], b.beta(live[k]), b.options);
    const double weight = type_weight * b.weight(pair);
    const double slope = weight * term.slope / divisor;
    r.losses[pair] += weight * term.value;
    r.grad[chosen_of(b, r, pair)] += slope;
    r.grad[rejected_of(b, r, unpaired ? live[low_order[k]] : pair)] -= slope;
  }
}

// The reported reward: beta (L - ref), or beta L (beta L / n) if no loss type needs a reference.
double reward(const Batch& b, int64_t pair, int64_t s) {
  const bool free = std::all_of(b.types.begin(), b.types.end(), is_reference_free);
  const bool averaged = free && std::any_of(b.types.begin(), b.types.end(), is_averaged);
  return b.beta(pair) * (b.logps[s] - (free ? 0.0 : b.ref_of(s))) / (averaged ? b.length_of(s) : 1.0);
}

Result solve(const Batch& b, double num_pairs, double chosen_tokens) {
  Result r;
  r.losses.assign(b.num_pairs, 0.0);
  r.grad.assign(b.sequences, 0.0);
  r.order.assign(b.num_pairs, 0);
  int64_t own_tokens = 0;
  for (int64_t p = 0; p < b.num_pairs; ++p) {
    const double gap = value_gap(b, p);
    r.gaps.push_back(gap);
    r.unrated += std::isnan(gap);
    if (std::fabs(gap) > b.options.tie_margin) {
      r.order[p] = gap > 0.0 ? 1 : -1;
      r.live += 1;
      if (!b.lengths.empty()) own_tokens += b.lengths[chosen_of(b, r, p)];
    }
    r.chosen_rewards.push_back(reward(b, p, chosen_of(b, r, p)));
    r.rejected_rewards.push_back(reward(b, p, rejected_of(b, r, p)));
  }
  const double divisor = num_pairs > 0.0 ? num_pairs : std::max(num_pairs < 0.0 ? double(r.live) : 0.0, 1.0);
  const double nll_scale = divisor / std::max(chosen_tokens >= 0.0 ? chosen_tokens : double(own_tokens), 1.0);
  for (int64_t p = 0; p < b.num_pairs; ++p) {
    if (r.order[p] == 0) continue;
    const int64_t w = chosen_of(b, r, p), l = rejected_of(b, r, p);
    LossPair pair{b.logps[w], b.logps[l], b.ref_of(w), b.ref_of(l),          b.length_of(w), b.length_of(l),
                  0.0,        0.0,        b.beta(p),   std::fabs(r.gaps[p]), nll_scale};
    if (!b.margins.empty()) {
      pair.chosen_margin = b.margins[w];
      pair.rejected_margin = b.margins[l];
    }
    for (size_t j = 0; j < b.types.size(); ++j) {
      const LossTerm term = pair_loss(int(b.types[j]), pair, b.options);
      const double weight = b.type_weights[j] * b.weight(p);
      r.losses[p] += weight * term.loss;
      r.grad[w] += weight * term.chosen / divisor;
      r.grad[l] += weight * term.rejected / divisor;
    }
  }
  for (size_t j = 0; j < b.types.size(); ++j) {
    if (b.types[j] != kAot && b.types[j] != kAotUnpaired) continue;
    add_aot(b, b.types[j] == kAotUnpaired, b.type_weights[j], divisor, r);
  }
  for (double x : r.losses) r.loss += x;
  r.loss /= divisor;
  return r;
}

std::vector<int64_t> read_pairs(const Tensor& tensor, int64_t sequences) {
  check_dtype("pairs", tensor, ScalarType::Long);
  check(tensor.dim() == 2 && tensor.size(1) == 2, kOp, ": pairs must have shape [P, 2], got ", shape_of(tensor));
  const Tensor packed = dense(tensor);
  std::vector<int64_t> pairs(packed.numel());
  std::copy_n(data_of<int64_t>(packed), pairs.size(), pairs.begin());
  for (size_t i = 0; i < pairs.size(); ++i) {
    check(pairs[i] >= 0 && pairs[i] < sequences, kOp, ": pairs[", i / 2, "] holds sequence ", pairs[i],
          ", but there are ", sequences, " sequences (0 to ", sequences - 1, ")");
    check(i % 2 == 0 || pairs[i] != pairs[i - 1], kOp, ": pairs[", i / 2, "] pairs sequence ", pairs[i],
          " with itself");
  }
  return pairs;
}

void check_losses(const Batch& b, double chosen_tokens) {
  check(!b.types.empty() && b.types.size() == b.type_weights.size(), kOp,
        ": loss_types and loss_weights must have one ", "entry for each loss, got ", b.types.size(), " and ",
        b.type_weights.size());
  for (int64_t type : b.types) {
    check(type >= 0 && type < kNumLossTypes, kOp, ": loss_types must be in [0, ", int(kNumLossTypes), "), got ", type);
    const bool needs_lengths = divides_by_length(int(type)) || (has_nll(int(type), b.options) && chosen_tokens < 0);
    check(!b.lengths.empty() || !needs_lengths || b.sequences == 0, kOp, ": loss type ", type,
          " divides by the number of tokens: lengths must be given");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference(
    Tensor seq_logps, Tensor ref_logps, Tensor lengths, Tensor pairs, Tensor scores, Tensor conditions,
    Tensor objectives, Tensor pair_weights, Tensor pair_betas, Tensor margins, std::vector<int64_t> loss_types,
    std::vector<double> loss_weights, std::vector<double> options, double num_pairs, double chosen_tokens) {
  check(seq_logps.dim() == 1, kOp, ": seq_logps must have shape [S], got ", shape_of(seq_logps));
  check(options.size() == kNumOptions, kOp, ": options must have ", kNumOptions, " values, got ", options.size());
  Batch b;
  b.sequences = seq_logps.size(0);
  b.pairs = read_pairs(pairs, b.sequences);
  b.num_pairs = pairs.size(0);
  b.logps = read_doubles("seq_logps", seq_logps);
  b.ref = read_vector("ref_logps", ref_logps, b.sequences);
  if (given(lengths)) {
    check_dtype("lengths", lengths, ScalarType::Long);
    check_vector("lengths", lengths, b.sequences);
    const Tensor packed = dense(lengths);
    b.lengths.assign(data_of<int64_t>(packed), data_of<int64_t>(packed) + b.sequences);
  }
  b.objectives_count = scores.dim() == 2 ? scores.size(1) : 0;
  b.scores = read_matrix("scores", scores, b.sequences, b.objectives_count);
  b.conditions = read_matrix("conditions", conditions, b.num_pairs, b.objectives_count);
  b.objectives = read_matrix("objectives", objectives, 2, b.objectives_count);
  check(b.scores.empty() || !b.objectives.empty(), kOp, ": scores are given, so objectives [2, ", b.objectives_count,
        "] (weights, strengths) must be too");
  b.weights = read_vector("pair_weights", pair_weights, b.num_pairs);
  b.betas = read_vector("pair_betas", pair_betas, b.num_pairs);
  b.margins = read_vector("margins", margins, b.sequences);
  b.types = std::move(loss_types);
  b.type_weights = std::move(loss_weights);
  std::memcpy(&b.options, options.data(), sizeof(b.options));
  check_losses(b, chosen_tokens);

  const Result r = solve(b, num_pairs, chosen_tokens);
  Tensor loss = torch::stable::new_empty(seq_logps, {}, seq_logps.scalar_type());
  if (seq_logps.scalar_type() == ScalarType::Double) {
    *mutable_data_of<double>(loss) = r.loss;
  } else {
    *mutable_data_of<float>(loss) = float(r.loss);
  }
  Tensor order = new_vector(pairs, b.num_pairs, ScalarType::Char);
  std::copy(r.order.begin(), r.order.end(), mutable_data_of<int8_t>(order));
  Tensor counts = new_vector(pairs, 3, ScalarType::Long);
  const int64_t ties = b.num_pairs - r.live, count_values[3] = {r.live, ties, r.unrated};
  std::copy_n(count_values, 3, mutable_data_of<int64_t>(counts));
  return {loss,
          write_doubles(seq_logps, r.losses),
          write_doubles(seq_logps, r.grad),
          write_doubles(seq_logps, r.chosen_rewards),
          write_doubles(seq_logps, r.rejected_rewards),
          write_doubles(seq_logps, r.gaps),
          order,
          counts};
}

}  // namespace cpo
