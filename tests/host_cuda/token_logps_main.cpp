// The CUDA token kernels with 64 real threads a block, for the sanitizers: each form of launch, rows at odd addresses
// in a heap block that ends with the last row, labels out of range.
#include "../../csrc/cuda/token_logps_launch.h"

using namespace cpo::cuda;

namespace {

constexpr int kSmall = 64;
bool wrong = false;  // said at the end: ThreadSanitizer misses some races, and has the more chances the more runs

template <typename T, bool kSoftcap, bool kExtras, bool kAnchored>
void run(int64_t rows, int64_t width, int64_t columns, const DeviceInfo& device) {
  using Acc = AccOf<T>;
  const int64_t stride = width + 3, first = 1;
  std::mt19937_64 random(width);
  std::unique_ptr<T[]> logits(new T[first + (rows - 1) * stride + width]);
  std::unique_ptr<int64_t[]> labels(new int64_t[rows]);
  std::unique_ptr<Acc[]> anchors(new Acc[2 * rows]), entropies(new Acc[2 * rows]);
  for (int64_t i = 0; i < rows; ++i) {
    labels[i] = int64_t(random() % columns);
    anchors[i] = Acc(random() % 9) - 4;
    anchors[rows + i] = anchors[i] + Acc(random() % 9) - 4;
    entropies[i] = entropies[rows + i] = 1;
    for (int64_t v = 0; v < width; ++v) logits[first + i * stride + v] = rounded<T>(Acc(random() % 9) - 4);
  }
  labels[0] = columns - 1;
  labels[1] = -100;
  labels[2] = -1;  // out of range, and so is the last: one column behind the heap block
  labels[rows - 1] = width;
  const Problem<T> p = problem_of(logits.get() + first, labels.get(), rows, stride, width, columns, -100, 1.0,
                                  kSoftcap ? 5.0 : 0.0, kAnchored ? anchors.get() : nullptr);
  const Plan plan = plan_of<kSmall>(p, kSoftcap, kExtras, device);
  std::unique_ptr<Acc[]> logp(new Acc[rows]), lse(new Acc[rows]), extra(new Acc[kExtras ? 4 * rows : 0]);
  for (const bool overwrite : {false, true}) {
    std::unique_ptr<Acc[]> scratch(new Acc[scratch_size(p, plan, overwrite)]);
    launch_forward<T, kSmall, kSoftcap, kExtras, kAnchored>("", p, {logp.get(), lse.get(), extra.get()}, overwrite,
                                                            plan, scratch.get(), nullptr);
    wrong = wrong || !(logp[0] < 0) || logp[1] != 0 || !std::isnan(logp[2]);
  }
  token_logps_backward<kSmall>("", p, lse.get(), logp.get(), kAnchored ? entropies.get() : nullptr, kSoftcap, plan,
                               nullptr);
}

template <typename T, bool kSoftcap, bool kExtras, bool kAnchored>
void run_forms() {
  const DeviceInfo pieces{8, false}, loops{1, false}, clusters{1, true};
  for (const DeviceInfo& device : {pieces, loops, clusters}) {
    run<T, kSoftcap, kExtras, kAnchored>(4, 5003, 4999, device);  // bfloat16: 2 blocks of 4096 columns, or 4 pieces
    run<T, kSoftcap, kExtras, kAnchored>(4, 21, 21, device);
  }
}

}  // namespace

int main() {
  run_forms<float, true, true, false>();
  run_forms<BFloat16, false, false, false>();
  run_forms<BFloat16, false, true, true>();
  if (wrong) host_fail("wrong log-probs");
}
