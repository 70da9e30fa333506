// The token kernels on the host, for ctypes: what csrc/cuda/token_logps.cu does after its checks, on a machine of the
// test's choice. 0: float32, 1: bfloat16, 2: float16, 3: float64.
#include "../../csrc/cuda/token_logps_launch.h"

using namespace cpo::cuda;

namespace {

struct Machine {
  int64_t block, multiprocessors, clusters, seed;

  DeviceInfo info() const { return {int(multiprocessors), clusters != 0}; }
};
struct Call {
  int64_t dtype, rows, stride, width, columns, ignore_index;
  double scale, softcap;
  void* logits;
  const int64_t* labels;
  const void* anchors;
};

template <typename Run>
void with_dtype(const Call& call, const Run& run) {
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

template <int kThreads, typename T>
void forward(const Machine& machine, const Call& call, bool overwrite, bool extras, void* logp, void* lse,
             void* extra) {
  using Acc = AccOf<T>;
  const Problem<T> p = problem_in<T>(call);
  const Plan plan = plan_of<kThreads>(p, call.softcap > 0, extras, machine.info());
  const std::unique_ptr<Acc[]> scratch(new Acc[scratch_size(p, plan, overwrite)]);
  token_logps_forward<kThreads>("", p, {static_cast<Acc*>(logp), static_cast<Acc*>(lse), static_cast<Acc*>(extra)},
                                overwrite, call.softcap > 0, extras, plan, scratch.get(), nullptr);
}

template <int kThreads, typename T>
void backward(const Machine& machine, const Call& call, const void* lse, const void* grads, const void* entropies) {
  using Acc = AccOf<T>;
  const Problem<T> p = problem_in<T>(call);
  const Plan plan = plan_of<kThreads>(p, call.softcap > 0, false, machine.info());
  token_logps_backward<kThreads>("", p, static_cast<const Acc*>(lse), static_cast<const Acc*>(grads),
                                 static_cast<const Acc*>(entropies), call.softcap > 0, plan, nullptr);
}

}  // namespace

extern "C" {

void host_forward(const Machine* machine, const Call* call, int overwrite, int extras, void* logp, void* lse,
                  void* extra) {
  host_seed = machine->seed;
  with_dtype(*call, [&](auto zero) {
    using T = decltype(zero);
    const auto run = machine->block == 64 ? forward<64, T> : forward<kTokenThreads, T>;
    run(*machine, *call, overwrite, extras, logp, lse, extra);
  });
}

void host_backward(const Machine* machine, const Call* call, const void* lse, const void* grads,
                   const void* entropies) {
  host_seed = machine->seed;
  with_dtype(*call, [&](auto zero) {
    using T = decltype(zero);
    const auto run = machine->block == 64 ? backward<64, T> : backward<kTokenThreads, T>;
    run(*machine, *call, lse, grads, entropies);
  });
}

void host_plan(const Machine* machine, int64_t rows, int64_t vectors, int held, int64_t* pieces, int64_t* cluster) {
  const Plan plan = plan_of<kTokenThreads>(rows, vectors, held, machine->info());
  *pieces = plan.pieces;
  *cluster = plan.cluster;
}
}
