// live_columns, live_grads and live_sum with real threads, for the sanitizers: rows at odd addresses and on 16-byte
// boundaries, in a heap block that ends with the last row; labels elsewhere, ignored rows, a last set of fewer rows.
#include "../../csrc/cuda/live_columns.cuh"
#include "../../csrc/cuda/token_logps_launch.h"

using namespace cpo::cuda;

namespace {

bool wrong = false;

template <typename T>
void run(int64_t rows, int64_t columns, int64_t gap, int64_t first, int64_t set_rows, double softcap, bool anchored) {
  using Acc = AccOf<T>;
  const int64_t stride = columns + gap, sets = shares(rows, set_rows);
  std::mt19937_64 random(columns);
  std::unique_ptr<T[]> logits(new T[first + (rows - 1) * stride + columns]);
  std::unique_ptr<int64_t[]> labels(new int64_t[rows]);
  std::unique_ptr<Acc[]> lse(new Acc[rows]), anchors(new Acc[2 * rows]);
  for (int64_t i = 0; i < rows; ++i) {
    labels[i] = int64_t(random() % columns);
    lse[i] = Acc(4);
    anchors[i] = Acc(random() % 3) - 1;
    anchors[rows + i] = anchors[i] + 1;
    for (int64_t v = 0; v < columns; ++v) logits[first + i * stride + v] = rounded<T>(Acc(random() % 9) - 4);
  }
  labels[0] = columns - 1;
  labels[1] = -100;
  labels[2] = -1;  // elsewhere, and so is the last: one column behind the heap block
  labels[rows - 1] = columns;
  lse[3] = Acc(NAN);
  const Problem<T> p = problem_of(logits.get() + first, labels.get(), rows, stride, columns, columns, -100, 1.0,
                                  softcap, anchored ? anchors.get() : nullptr);
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

// Numbers are small integers, whose sums are exact in any order; `first` numbers before `made` put it off 16 bytes.
template <typename T>
void run_sum(int64_t sets, int64_t columns, int64_t width, int64_t first) {
  using Acc = AccOf<T>;
  std::mt19937_64 random(width);
  const auto number = [&] { return rounded<T>(Acc(random() % 5) - 2); };
  const int64_t stride = columns + 3;
  std::vector<int64_t> ids;
  const std::unique_ptr<int64_t[]> offsets(new int64_t[sets + 1]{});
  for (int64_t k = 0; k < sets; ++k) {
    for (int64_t v = 0; v < columns; ++v) {
      if (k != 1 && random() % 3 == 0) ids.push_back(v);  // not the last, whose search ends behind the ids
    }
    if (!ids.empty() && ids.back() == columns - 1) ids.pop_back();
    offsets[k + 1] = int64_t(ids.size());
  }
  const int64_t live = int64_t(ids.size()), before = (sets - 1) * stride + columns;
  const std::unique_ptr<T[]> tail(new T[before]), made(new T[first + live * width]), out(new T[columns * width]);
  const std::unique_ptr<Acc[]> tails(new Acc[sets * width]), scratch(new Acc[sum_scratch_size(sets, columns)]);
  const std::unique_ptr<int64_t[]> exact(new int64_t[ids.size()]);
  std::copy(ids.begin(), ids.end(), exact.get());
  for (int64_t i = 0; i < before; ++i) tail[i] = number();
  for (int64_t i = 0; i < sets * width; ++i) tails[i] = Acc(random() % 5) - 2;
  for (int64_t i = 0; i < first + live * width; ++i) made[i] = number();
  std::vector<Acc> want(columns * width);
  for (int64_t k = 0; k < sets; ++k) {
    for (int64_t i = 0; i < columns * width; ++i) {
      want[i] += widened(tail[k * stride + i / width]) * tails[k * width + i % width];
    }
    for (int64_t at = offsets[k]; at < offsets[k + 1]; ++at) {
      for (int64_t h = 0; h < width; ++h) want[ids[at] * width + h] += widened(made[first + at * width + h]);
    }
  }
  launch_live_sum("", tail.get(), stride, tails.get(), made.get() + first, exact.get(), offsets.get(), sets, columns,
                  width, scratch.get(), out.get(), nullptr);
  for (int64_t i = 0; i < columns * width; ++i) wrong = wrong || widened(out[i]) != want[i];
}

}  // namespace

int main() {
  run<float>(11, 301, 0, 1, 6, 0.0, false);
  run<float>(9, 301, 3, 0, 4, 5.0, true);
  run<BFloat16>(9, 1043, 5, 0, 4, 0.0, true);
  run<double>(7, 200, 0, 0, 7, 0.0, false);
  run_sum<float>(3, 37, 132, 0);
  run_sum<float>(3, 5, 170, 1);
  run_sum<BFloat16>(2, 33, 264, 0);
  run_sum<Half>(3, 9, 7, 0);
  run_sum<double>(2, 9, 66, 0);
  if (wrong) host_fail("wrong live columns");
}
