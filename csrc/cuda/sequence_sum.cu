// sequence_sum on the GPU: checks and launch.
#include "sequence_sum.cuh"

#include "ops.h"

namespace cpo::cuda {
namespace {

constexpr const char* kOp = "sequence_sum";

template <typename T>
void sum(const Tensor& logps, const Tensor& cu, const Tensor& weights, bool average, Tensor& out, void* stream) {
  launch_sequence_sum(data_of<T>(logps), data_of<int64_t>(cu), given(weights) ? data_of<T>(weights) : nullptr, average,
                      logps.size(0), out.size(0), mutable_data_of<T>(out), stream);
}

}  // namespace

// cu_seqlens stays on the device: a sequence beyond the tokens gives NaN instead of an error.
Tensor sequence_sum(Tensor token_logps, Tensor cu_seqlens, Tensor token_weights, bool average) {
  const ScalarType type = token_logps.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, kOp, ": token_logps must be float32 or float64, got ",
        name_of(type));
  check(token_logps.dim() == 1, kOp, ": token_logps must have shape [N], got ", shape_of(token_logps));
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Long);
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, kOp, ": cu_seqlens must have shape [S + 1], got ",
        shape_of(cu_seqlens));
  check(cu_seqlens.size(0) - 1 <= kMaxGrid, kOp, ": at most ", kMaxGrid, " sequences, got ", cu_seqlens.size(0) - 1);
  if (given(token_weights)) {
    check_dtype("token_weights", token_weights, type);
    check_vector("token_weights", token_weights, token_logps.size(0));
  }
  check(token_logps.is_cuda(), kOp, ": token_logps must be a CUDA tensor");
  check_device("cu_seqlens", cu_seqlens, "token_logps", token_logps);
  if (given(token_weights)) check_device("token_weights", token_weights, "token_logps", token_logps);
  const OnDeviceOf on(token_logps);
  token_logps = dense(token_logps);
  cu_seqlens = dense(cu_seqlens);
  token_weights = dense(token_weights);
  Tensor out = new_vector(token_logps, cu_seqlens.size(0) - 1, type);
  if (type == ScalarType::Double) {
    sum<double>(token_logps, cu_seqlens, token_weights, average, out, on.stream());
  } else {
    sum<float>(token_logps, cu_seqlens, token_weights, average, out, on.stream());
  }
  return out;
}

}  // namespace cpo::cuda
