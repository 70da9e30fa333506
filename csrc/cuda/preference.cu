// preference on the GPU: checks, outputs and launches. Checks that the CPU backend makes but that would need a copy
// from the device here (the sequences in `pairs`) are replaced by NaN in the kernel's results.
#include <cstring>

#include "ops.h"
#include "preference_launch.h"

namespace cpo::cuda {
namespace {

constexpr const char* kOp = "preference";

// The tensors whose memory the launches read.
struct Inputs {
  std::vector<std::pair<const char*, Tensor>> kept;

  const Tensor& keep(const char* name, const Tensor& tensor) {
    kept.emplace_back(name, dense(tensor));
    return kept.back().second;
  }
  void check_devices() const {
    check(kept[0].second.is_cuda(), kOp, ": ", kept[0].first, " must be a CUDA tensor");
    for (const auto& [name, tensor] : kept) check_device(name, tensor, kept[0].first, kept[0].second);
  }
  FloatArray floats(const char* name, const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    check(type == ScalarType::Double || type == ScalarType::Float, kOp, ": ", name, " must be float64 or float32, got ",
          name_of(type));
    return {keep(name, tensor).const_data_ptr(), type == ScalarType::Double};
  }
  FloatArray vector(const char* name, const Tensor& tensor, int64_t size) {
    if (!given(tensor)) return {nullptr, false};
    check_vector(name, tensor, size);
    return floats(name, tensor);
  }
  FloatArray matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    if (!given(tensor)) return {nullptr, false};
    check_matrix(name, tensor, rows, columns);
    return floats(name, tensor);
  }
  const int64_t* integers(const char* name, const Tensor& tensor) {
    check_dtype(name, tensor, ScalarType::Long);
    return data_of<int64_t>(keep(name, tensor));
  }
};

void check_losses(const PreferenceInput& in, const std::vector<int64_t>& types, const std::vector<double>& weights) {
  check(!types.empty() && types.size() == weights.size(), kOp, ": loss_types and loss_weights must have one ",
        "entry for each loss, got ", types.size(), " and ", weights.size());
  for (int64_t type : types) {
    check(type >= 0 && type < kNumLossTypes, kOp, ": loss_types must be in [0, ", int(kNumLossTypes), "), got ", type);
    const bool needs_lengths =
        divides_by_length(int(type)) || (has_nll(int(type), in.options) && in.chosen_tokens < 0.0);
    check(in.lengths != nullptr || !needs_lengths || in.num_sequences == 0, kOp, ": loss type ", type,
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
  Inputs inputs;
  PreferenceInput in{};
  in.seq_logps = inputs.floats("seq_logps", seq_logps);
  in.pairs = inputs.integers("pairs", pairs);
  check(pairs.dim() == 2 && pairs.size(1) == 2, kOp, ": pairs must have shape [P, 2], got ", shape_of(pairs));
  in.num_pairs = pairs.size(0);
  in.num_sequences = seq_logps.size(0);
  in.num_objectives = scores.dim() == 2 ? scores.size(1) : 0;
  in.ref_logps = inputs.vector("ref_logps", ref_logps, in.num_sequences);
  if (given(lengths)) {
    check_vector("lengths", lengths, in.num_sequences);
    in.lengths = inputs.integers("lengths", lengths);
  }
  in.scores = inputs.matrix("scores", scores, in.num_sequences, in.num_objectives);
  in.conditions = inputs.matrix("conditions", conditions, in.num_pairs, in.num_objectives);
  in.objectives = inputs.matrix("objectives", objectives, 2, in.num_objectives);
  check(!given(scores) || given(objectives), kOp, ": scores are given, so objectives [2, ", in.num_objectives,
        "] (weights, strengths) must be too");
  in.pair_weights = inputs.vector("pair_weights", pair_weights, in.num_pairs);
  in.pair_betas = inputs.vector("pair_betas", pair_betas, in.num_pairs);
  in.margins = inputs.vector("margins", margins, in.num_sequences);
  std::memcpy(&in.options, options.data(), sizeof(in.options));
  in.divisor = num_pairs;
  in.chosen_tokens = chosen_tokens;
  check_losses(in, loss_types, loss_weights);
  inputs.check_devices();
  const OnDeviceOf on(seq_logps);
  set_losses(in, loss_types.data(), loss_weights.data(), loss_types.size());

  const auto new_order = [&](int type) {
    return new_vector(pairs, lists(in, type) ? kOrderWords * in.num_pairs : 0, ScalarType::Long);
  };
  Tensor paired_order = new_order(kAot), unpaired_order = new_order(kAotUnpaired);
  in.aot = order_in(mutable_data_of<int64_t>(paired_order), in.num_pairs);
  in.aot_unpaired = order_in(mutable_data_of<int64_t>(unpaired_order), in.num_pairs);

  const ScalarType type = seq_logps.scalar_type();
  Tensor loss = torch::stable::new_empty(seq_logps, {}, type);
  Tensor losses = new_vector(seq_logps, in.num_pairs, type), grad = new_vector(seq_logps, in.num_sequences, type);
  Tensor chosen = new_vector(seq_logps, in.num_pairs, type), rejected = new_vector(seq_logps, in.num_pairs, type);
  Tensor gap = new_vector(seq_logps, in.num_pairs, type), order = new_vector(pairs, in.num_pairs, ScalarType::Char);
  Tensor counts = new_vector(pairs, 3, ScalarType::Long);
  const auto to = [&](Tensor& t) { return FloatOutput{t.mutable_data_ptr(), type == ScalarType::Double}; };
  const PreferenceOutput out{to(loss),
                             to(losses),
                             to(grad),
                             to(chosen),
                             to(rejected),
                             to(gap),
                             mutable_data_of<int8_t>(order),
                             mutable_data_of<int64_t>(counts)};
  launch_preference(in, out, on.stream());
  return {loss, losses, grad, chosen, rejected, gap, order, counts};
}

}  // namespace cpo::cuda
