// The CUDA ops, and what each needs from torch: its tensors on one device, and that device and its stream current.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common.h"

namespace cpo::cuda {

// Makes a tensor's device the current one during its lifetime.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }
  int device() const { return device_; }
  void* stream() const { return stream_; }

 private:
  int device_;
  void* stream_ = nullptr;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another kind of device";
}

// Checks that `t` is on the device of `like`, where the op runs.
inline void check_device(const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  check(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, " is on ", device_of(t), " and ",
        like_name, " on ", device_of(like), ": move one of them");
}

// Shapes and formulas: cpo_kernels/library.py.
std::tuple<Tensor, Tensor, Tensor> token_logps_fwd(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                   double softcap, int64_t vocab_size, bool extras, Optional anchors);
void token_logps_bwd_(Tensor logits, Tensor labels, Tensor lse, Tensor grad, int64_t ignore_index, double scale,
                      double softcap, int64_t vocab_size, Optional anchors, Optional entropies);
std::tuple<Tensor, Tensor, Tensor> token_logps_fused_(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                      double softcap, int64_t vocab_size, bool extras,
                                                      Optional anchors);
std::tuple<Tensor, Tensor, Tensor> live_columns(Tensor logits, Tensor labels, Tensor lse, double eps, int64_t set_rows,
                                                int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                                                Optional anchors);
Tensor live_grads(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                  int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                  Optional anchors);
Tensor live_sum(Tensor tail, Tensor tails, Tensor made, Tensor columns, Tensor offsets);
Tensor sequence_sum(Tensor token_logps, Tensor cu_seqlens, Tensor token_weights, bool average);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference(
    Tensor seq_logps, Tensor ref_logps, Tensor lengths, Tensor pairs, Tensor scores, Tensor conditions,
    Tensor objectives, Tensor pair_weights, Tensor pair_betas, Tensor margins, std::vector<int64_t> loss_types,
    std::vector<double> loss_weights, std::vector<double> options, double num_pairs, double chosen_tokens);

}  // namespace cpo::cuda
