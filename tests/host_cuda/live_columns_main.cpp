// live_columns and live_grads with real threads, for the sanitizers: rows at odd addresses and on 16-byte boundaries,
// in a heap block that ends with the last row; labels elsewhere, ignored rows, a last set of fewer rows.
#include "../../csrc/cuda/live_columns.cuh"
#include "../../csrc/cuda/token_logps_launch.h"

using namespace cpo::cuda;

namespace {

bool wrong = false;

template <typename T>
void run(int64_t rows, int64_t columns, int64_t gap, int64_t first, int64_t set_rows, double softcap) {
  using Acc = AccOf<T>;
  const int64_t stride = columns + gap, sets = shares(rows, set_rows);
  std::mt19937_64 random(columns);
  std::unique_ptr<T[]> logits(new T[first + (rows - 1) * stride + columns]);
  std::unique_ptr<int64_t[]> labels(new int64_t[rows]);
  std::unique_ptr<Acc[]> lse(new Acc[rows]);
  for (int64_t i = 0; i < rows; ++i) {
    labels[i] = int64_t(random() % columns);
    lse[i] = Acc(4);
    for (int64_t v = 0; v < columns; ++v) logits[first + i * stride + v] = rounded<T>(Acc(random() % 9) - 4);
  }
  labels[0] = columns - 1;
  labels[1] = -100;
  labels[2] = -1;  // elsewhere, and so is the last: one column behind the heap block
  labels[rows - 1] = columns;
  lse[3] = Acc(NAN);
  const Problem<T> p =
      problem_of(logits.get() + first, labels.get(), rows, stride, columns, columns, -100, 1.0, softcap);
  std::unique_ptr<Acc[]> scratch(new Acc[live_scratch_size(p)]), tail(new Acc[sets * columns]), sums(new Acc[rows]);
  std::unique_ptr<bool[]> live(new bool[sets * columns]);
  launch_live_columns("", p, lse.get(), 0.9, set_rows, softcap > 0, scratch.get(), live.get(), tail.get(), sums.get(),
                      nullptr);
  std::vector<int64_t> ids, offsets{0};
  int64_t total = 0;
  for (int64_t k = 0; k < sets; ++k) {
    for (int64_t v = 0; v < columns; ++v) {
      if (live[k * columns + v]) ids.push_back(v);
    }
    offsets.push_back(int64_t(ids.size()));
    total += (k + 1 < sets ? set_rows : rows - k * set_rows) * (offsets[k + 1] - offsets[k] + 1);
  }
  std::unique_ptr<T[]> out(new T[total]);
  const std::unique_ptr<int64_t[]> exact(new int64_t[ids.size()]);  // a vector may have room behind its end
  std::copy(ids.begin(), ids.end(), exact.get());
  launch_live_grads("", p, lse.get(), sums.get(), exact.get(), offsets.data(), set_rows, softcap > 0, out.get(),
                    nullptr);
  wrong = wrong || !live[columns - 1] || sums[1] != 0 || !(sums[2] > 0) || !std::isnan(sums[3]) ||
          !std::isnan(widened(out[4 * (offsets[1] + 1) - 1]));
}

}  // namespace

int main() {
  run<float>(11, 301, 0, 1, 6, 0.0);
  run<float>(9, 301, 3, 0, 4, 5.0);
  run<BFloat16>(9, 1043, 5, 0, 4, 0.0);
  run<double>(7, 200, 0, 0, 7, 0.0);
  if (wrong) host_fail("wrong live columns");
}
