// sequence_sum and preference of csrc/cuda on a CPU: C functions over raw pointers, for ctypes.
#include "../../csrc/cuda/preference_launch.h"
#include "../../csrc/cuda/sequence_sum.cuh"

using namespace cpo;
using namespace cpo::cuda;

extern "C" {

void set_seed(uint64_t seed) { host_seed = seed; }

void sequence_sum(bool is_double, const void* logps, const int64_t* cu, const void* weights, bool average,
                  int64_t tokens, int64_t sequences, void* out) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    launch_sequence_sum(static_cast<const T*>(logps), cu, static_cast<const T*>(weights), average, tokens, sequences,
                        static_cast<T*>(out), nullptr);
  };
  is_double ? run(0.0) : run(0.0f);
}

// floats: seq_logps, ref_logps, scores, conditions, objectives, pair_weights, pair_betas, margins, null where absent.
// sizes: P, S, K, number of losses. outputs: loss, losses, grad, chosen rewards, rejected rewards, gap. orders: [12 P].
void preference(int threads, const void* const* floats, const bool* is_double, const int64_t* lengths,
                const int64_t* pairs, const int64_t* sizes, const int64_t* types, const double* weights,
                const double* options, double num_pairs, double chosen_tokens, void* const* outputs, int8_t* order,
                int64_t* counts, int64_t* orders) {
  PreferenceInput in{};
  FloatArray* const arrays[] = {&in.seq_logps,  &in.ref_logps,    &in.scores,     &in.conditions,
                                &in.objectives, &in.pair_weights, &in.pair_betas, &in.margins};
  for (int i = 0; i < 8; ++i) *arrays[i] = {floats[i], is_double[i]};
  in.lengths = lengths;
  in.pairs = pairs;
  in.num_pairs = sizes[0];
  in.num_sequences = sizes[1];
  in.num_objectives = sizes[2];
  std::memcpy(&in.options, options, sizeof(in.options));
  in.divisor = num_pairs;
  in.chosen_tokens = chosen_tokens;
  in.aot = order_in(orders, in.num_pairs);
  in.aot_unpaired = order_in(orders + kOrderWords * in.num_pairs, in.num_pairs);
  set_losses(in, types, weights, size_t(sizes[3]));
  const auto to = [&](int i) { return FloatOutput{outputs[i], is_double[0]}; };
  const PreferenceOutput out{to(0), to(1), to(2), to(3), to(4), to(5), order, counts};
  threads == 64 ? launch_preference<64>(in, out, nullptr) : launch_preference<256>(in, out, nullptr);
}

}  // extern "C"
