// live_columns, live_grads and live_sum on the host, for ctypes: what csrc/cuda/live_columns.cu does after its checks.
// 0: float32, 1: bfloat16, 2: float16, 3: float64.
#include "../../csrc/cuda/live_columns.cuh"
#include "../../csrc/cuda/token_logps_launch.h"

using namespace cpo::cuda;

namespace {

struct Call {
  int64_t dtype, rows, stride, width, columns, ignore_index, set_rows, seed;
  double scale, softcap, eps;
  void* logits;
  const int64_t* labels;
  const void *lse, *anchors;
};

struct SumCall {
  int64_t dtype, stride, sets, columns, width, seed;
};

template <typename Call, typename Run>
void with_dtype(const Call& call, const Run& run) {
  host_seed = call.seed;
  switch (call.dtype) {
    case 0: return run(float{});
    case 1: return run(BFloat16{});
    case 2: return run(Half{});
    default: return run(double{});
  }
}

template <typename T>
Problem<T> problem_in(const Call& c) {
  return problem_of(static_cast<T*>(c.logits), c.labels, c.rows, c.stride, c.width, c.columns, c.ignore_index, c.scale,
                    c.softcap, static_cast<const AccOf<T>*>(c.anchors));
}

}  // namespace

extern "C" {

void host_live_columns(const Call* call, bool* live, void* tail, void* row_sums) {
  with_dtype(*call, [&](auto zero) {
    using T = decltype(zero);
    using Acc = AccOf<T>;
    const Problem<T> p = problem_in<T>(*call);
    const std::unique_ptr<Acc[]> scratch(new Acc[live_scratch_size(p)]);
    launch_live_columns("", p, static_cast<const Acc*>(call->lse), call->eps, call->set_rows, call->softcap > 0,
                        scratch.get(), live, static_cast<Acc*>(tail), static_cast<Acc*>(row_sums), nullptr);
  });
}

void host_live_grads(const Call* call, const void* row_sums, const int64_t* ids, const int64_t* offsets, void* out) {
  with_dtype(*call, [&](auto zero) {
    using T = decltype(zero);
    using Acc = AccOf<T>;
    launch_live_grads("", problem_in<T>(*call), static_cast<const Acc*>(call->lse), static_cast<const Acc*>(row_sums),
                      ids, offsets, call->set_rows, call->softcap > 0, static_cast<T*>(out), nullptr);
  });
}

void host_live_sum(const SumCall* call, const void* tail, const void* tails, const void* made, const int64_t* ids,
                   const int64_t* offsets, void* out) {
  with_dtype(*call, [&](auto zero) {
    using T = decltype(zero);
    using Acc = AccOf<T>;
    const std::unique_ptr<Acc[]> scratch(new Acc[sum_scratch_size(call->sets, call->columns)]);
    launch_live_sum("", static_cast<const T*>(tail), call->stride, static_cast<const Acc*>(tails),
                    static_cast<const T*>(made), ids, offsets, call->sets, call->columns, call->width, scratch.get(),
                    static_cast<T*>(out), nullptr);
  });
}
}
