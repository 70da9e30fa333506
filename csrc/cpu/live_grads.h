// Rows of the live gradients. Formulas: cpo_kernels/reference/live_columns.py.
#pragma once

#include <limits>

#include "rows.h"

namespace cpo {
namespace {

// Columns that are written, and whose sum is added to tau, at a time: the same bits in live_grads, which stores the
// gradients of all rows, and in live_sums_of_logits_, which does not.
constexpr int64_t kGather = 960;

// set_rows, at most all rows.
inline int64_t check_sets(const char* op, int64_t set_rows, int64_t rows) {
  check(set_rows >= 1, op, ": set_rows must be at least 1, got ", set_rows);
  return std::min(set_rows, std::max<int64_t>(rows, 1));
}

// Row i counts if it has a label and its log-sum-exp is finite.
inline bool counts(const Rows& rows, int64_t i, double lse) { return !rows.ignored(i) && std::isfinite(lse); }

inline bool label_here(const Rows& rows, int64_t i) { return rows.labels[i] >= 0 && rows.labels[i] < rows.columns; }

// The exact s of row i's label, less that of its stored logit.
inline double label_excess(const Rows& rows, int64_t i, double lse) {
  if (!rows.anchors) return 0.0;
  const auto size = [&](double y, double slope) {
    return slope * std::exp(rows.map.nat * y - (lse - rows.z_lacks(i)));
  };
  const double stored = load_element(rows.type, rows.row(i) + rows.labels[i] * rows.element_size) + rows.lacks(i);
  return size(label_y(rows, i), label_slope(rows, i)) - size(stored_label_y(rows, i), slope_at(rows, stored));
}

// (1 - p) dz/du of row i's label.
inline double label_grad(const Rows& rows, int64_t i, double lse) {
  const double logp = rows.map.nat * label_y(rows, i) - (lse - rows.z_lacks(i));
  return -std::expm1(logp) * label_slope(rows, i);
}

// -s of row i, or (onehot - s), in the n live columns of its set, some of them at a time and in order.
class RowGrads {
 public:
  RowGrads(const Rows& rows, int64_t i, double lse, const int64_t* columns, int64_t n)
      : rows_(&rows), columns_(columns), i_(i), lse_(lse), counts_(counts(rows, i, lse)) {
    if (!counts_) return;
    const Shift s = shift_of(rows, lse - rows.z_lacks(i));
    shift_ = s.shift, factor_ = s.factor * rows.scale;
    if (!label_here(rows, i)) return;
    const int64_t* at = std::lower_bound(columns, columns + n, rows.labels[i]);
    if (at < columns + n && *at == rows.labels[i]) label_ = at - columns;
  }
  // Columns [first, first + n) to g, in the dtype of the logits.
  void write(int64_t first, int64_t n, void* g) {
    const int64_t size = rows_->element_size;
    if (!counts_) {
      std::memset(g, 0, size_t(n * size));
      return;
    }
    live_ += rows_->kernels->gather(rows_->row(i_), columns_ + first, n, rows_->map_of(i_), shift_, factor_, g);
    if (label_ < first || label_ >= first + n) return;
    live_ += label_excess(*rows_, i_, lse_);
    store_element(rows_->type, static_cast<char*>(g) + (label_ - first) * size, label_grad(*rows_, i_, lse_));
  }
  // What `write` will read.
  void prefetch(int64_t first, int64_t n) const {
    if (!counts_ || !n) return;
    const char *from = rows_->row(i_) + columns_[first] * rows_->element_size,
               *to = rows_->row(i_) + columns_[first + n - 1] * rows_->element_size;
    for (; from <= to; from += 64) __builtin_prefetch(from);
  }
  // Once all columns are written.
  double tau(double row_sum) const {
    if (!counts_) return rows_->ignored(i_) ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    return std::min(0.0, live_ - row_sum);
  }

 private:
  const Rows* rows_;
  const int64_t* columns_;
  int64_t i_, label_ = -1;
  double lse_, shift_ = 0.0, factor_ = 0.0, live_ = 0.0;
  bool counts_;
};

// [g_A, tau] of row i: n + 1 numbers.
inline void write_row(const Rows& rows, int64_t i, double lse, double row_sum, const int64_t* columns, int64_t n,
                      void* to) {
  const int64_t size = rows.element_size;
  char* g = static_cast<char*>(to);
  RowGrads row(rows, i, lse, columns, n);
  for (int64_t j = 0; j < n; j += kGather) row.write(j, std::min(kGather, n - j), g + j * size);
  store_element(rows.type, g + n * size, row.tau(row_sum));
}

}  // namespace
}  // namespace cpo
