// The CUDA kernels of sequence_sum and preference with 64 real threads a block, for the sanitizers. Every array is a
// heap block of its exact size; some pairs name sequences that do not exist.
#include <cstdio>

#include "../../csrc/cuda/preference_launch.h"
#include "../../csrc/cuda/sequence_sum.cuh"

using namespace cpo;
using namespace cpo::cuda;

namespace {

constexpr int kThreads = 64;

std::vector<double> numbers(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> values(count);
  for (double& x : values) x = std::uniform_real_distribution<double>(-3.0, 3.0)(random);
  return values;
}

void run_preference(int64_t pairs, int64_t sequences, bool scored) {
  constexpr int64_t kObjectives = 5;
  std::mt19937_64 random(1);
  std::vector<int64_t> index(2 * pairs), lengths(sequences), orders(2 * kOrderWords * pairs), counts(3);
  for (int64_t& s : index) s = int64_t(random() % uint64_t(sequences + 2)) - 1;  // -1 and `sequences` do not exist
  if (pairs > 2) index[0] = INT64_MIN, index[5] = INT64_MAX;
  for (int64_t& n : lengths) n = int64_t(random() % 30);
  auto logps = numbers(sequences, 2), ref = numbers(sequences, 3), scores = numbers(sequences * kObjectives, 4);
  auto conditions = numbers(pairs * kObjectives, 5), weights = numbers(pairs, 6);
  std::vector<double> objectives(2 * kObjectives, 0.7), options(kNumOptions, 0.1), loss(1), grad(sequences);
  std::vector<double> losses(pairs), chosen(pairs), rejected(pairs), gap(pairs);
  std::vector<int8_t> order(pairs);

  PreferenceInput in{};
  in.seq_logps = {logps.data(), true};
  in.ref_logps = {ref.data(), true};
  in.lengths = lengths.data();
  in.pairs = index.data();
  if (scored) {
    in.scores = {scores.data(), true};
    in.conditions = {conditions.data(), true};
    in.objectives = {objectives.data(), true};
  }
  in.pair_weights = {weights.data(), true};
  in.num_pairs = pairs;
  in.num_sequences = sequences;
  in.num_objectives = scored ? kObjectives : 0;
  std::memcpy(&in.options, options.data(), sizeof(in.options));
  in.divisor = in.chosen_tokens = -1.0;
  in.aot = order_in(orders.data(), pairs);
  in.aot_unpaired = order_in(orders.data() + kOrderWords * pairs, pairs);
  std::vector<int64_t> types(kNumLossTypes);
  std::iota(types.begin(), types.end(), 0);
  const std::vector<double> type_weights(kNumLossTypes, 0.5);
  set_losses(in, types.data(), type_weights.data(), types.size());
  const auto to = [](std::vector<double>& x) { return FloatOutput{x.data(), true}; };
  launch_preference<kThreads>(
      in, {to(loss), to(losses), to(grad), to(chosen), to(rejected), to(gap), order.data(), counts.data()}, nullptr);
  if (counts[0] + counts[1] != pairs) host_fail("pairs are not counted");
}

template <typename T>
void run_sequence_sum() {
  const std::vector<T> logps(1000, T(0.5)), weights(1000, T(2));
  const std::vector<int64_t> cu{0, 0, 1, 700, 640, 1000, 1001};
  std::vector<T> out(cu.size() - 1);
  for (const bool average : {false, true}) {
    launch_sequence_sum<T, kThreads>(logps.data(), cu.data(), average ? nullptr : weights.data(), average, 1000,
                                     int64_t(out.size()), out.data(), nullptr);
  }
  if (out[2] != T(0.5)) host_fail("wrong mean");
}

}  // namespace

int main() {
  run_sequence_sum<float>();
  run_sequence_sum<double>();
  run_preference(100, 30, true);
  run_preference(70, 30, false);
  run_preference(0, 3, true);
  run_preference(3, 4200, true);
  std::puts("done");
}
