// The CPU's own matmuls, of bfloat16 numbers on processors with instructions for them.
#pragma once

#include <functional>

#include "lines.h"
#include "rows.h"

namespace cpo {

// Raises if there are none here.
const Bf16Matmul& bf16_matmul(const char* op);

// Log-probs and log-sum-exp of bfloat16 logits of which only sums are known, part(k, row) in the k-th part of
// the columns. anchors [2, rows],
// and at_label, y of the labels as they would be stored.
std::tuple<Tensor, Tensor> logps_of_partials(const Tensor& labels, int64_t ignore_index, double scale,
                                             int64_t vocab_size, const Tensor& anchors, int64_t parts,
                                             const std::function<Partial(int64_t, int64_t)>& part,
                                             const std::vector<float>& at_label);

namespace {

constexpr int64_t kPackedPairs =
    128;  // of the inner dimension at a time: a panel of them, 32 kB, stays in the L1 cache

inline int64_t panels_of(int64_t width) { return (width + kPanel - 1) / kPanel; }

// Panels of `width` columns per task: about even, at most `most`, and where they are few, as many tasks as threads.
inline int64_t panels_per_task(int64_t width, int64_t blocks, int64_t most) {
  const int64_t panels = panels_of(width), threads = torch::stable::get_num_threads();
  const int64_t shares = (threads + blocks - 1) / std::max<int64_t>(1, blocks);
  const int64_t parts = std::max(int64_t(1), std::max((panels + most - 1) / most, std::min(panels, shares)));
  return (panels + parts - 1) / parts;
}

// Products by tiles (Bf16Matmul::add_tiles): of the inner dimension at a time. With 320 numbers dX of 801 x 49,152 x
// 576 took 1.03 and dW 1.06 times as long.
constexpr int64_t kStep = 480, kPairOfTiles = 2 * kTile;

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t steps_of(int64_t n) { return (n + kPairOfTiles - 1) / kPairOfTiles; }

// The sums of add_tiles, a row at a time. Rows of n numbers are read and written up to whole tiles.
struct TileSums {
  float* sums;
  int64_t row_tiles;

  float* at(int64_t row, int64_t v) const {
    const int64_t tile = (v / kPairOfTiles * row_tiles + row / kTile) * 2 + v % kPairOfTiles / kTile;
    return sums + (tile * kTile + row % kTile) * kTile;
  }
  void put(const float* from, int64_t row, int64_t n) const {
    for (int64_t v = 0; v < n; v += kTile) std::copy_n(from + v, kTile, at(row, v));
  }
  void get(int64_t row, int64_t n, float* to) const {
    for (int64_t v = 0; v < n; v += kTile) std::copy_n(at(row, v), kTile, to + v);
  }
};

inline void prefetch(const BFloat16* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(x + i);
}

inline void check_bf16_matrix(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 2, op, ": ", name, " must be a matrix, got shape ", shape_of(t));
  check_dtype(name, t, ScalarType::BFloat16);
  check(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", name, " must have unit stride over its columns, got stride ",
        t.stride(1), "; call .contiguous() first");
}

}  // namespace
}  // namespace cpo
