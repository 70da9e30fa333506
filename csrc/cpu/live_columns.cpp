// live_columns, live_grads and live_sum on the CPU: the columns of the vocabulary in which a set of rows has a
// significant gradient, the gradient there, and dW. Formulas: cpo_kernels/reference/live_columns.py.
#include <limits>

#include "rows.h"

namespace cpo {
namespace {

void check_sets(const char* op, int64_t set_rows) {
  check(set_rows >= 1, op, ": set_rows must be at least 1, got ", set_rows);
}

// Row i counts if it has a label and its log-sum-exp is finite.
template <typename Acc>
bool counts(const Rows& rows, const Acc* lse, int64_t i) {
  return !rows.ignored(i) && std::isfinite(lse[i]);
}

bool label_here(const Rows& rows, int64_t i) { return rows.labels[i] >= 0 && rows.labels[i] < rows.columns; }

// The exact s of row i's label, less that of its stored logit.
double label_excess(const Rows& rows, int64_t i, double lse) {
  if (!rows.anchors) return 0.0;
  const auto size = [&](double y, double slope) {
    return slope * std::exp(rows.map.nat * y - (lse - rows.z_lacks(i)));
  };
  const double stored = load_element(rows.type, rows.row(i) + rows.labels[i] * rows.element_size) + rows.lacks(i);
  return size(label_y(rows, i), label_slope(rows, i)) - size(stored_label_y(rows, i), slope_at(rows, stored));
}

template <typename Acc>
void find_columns(const Rows& rows, const Acc* lse, double eps, int64_t set_rows, bool* live, Acc* tail,
                  Acc* row_sums) {
  const int64_t sets = (rows.count + set_rows - 1) / set_rows;
  const int64_t blocks = (rows.columns + kColumnBlock - 1) / kColumnBlock;
  std::fill_n(live, sets * rows.columns, false);
  for (int64_t i = 0; i < rows.count; ++i) {
    if (counts(rows, lse, i) && label_here(rows, i)) live[i / set_rows * rows.columns + rows.labels[i]] = true;
  }
  std::vector<double> partial(size_t(blocks * rows.count));  // [blocks, N], added in this order
  parallel_rows(sets * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<const void*> x;
    std::vector<double> offset, shift, factor, sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t set = task / blocks, block = task % blocks, first = block * kColumnBlock;
      const int64_t low = set * set_rows, high = std::min(low + set_rows, rows.count);
      x.clear(), offset.clear(), shift.clear(), factor.clear();
      for (int64_t i = low; i < high; ++i) {
        if (!counts(rows, lse, i)) continue;
        const Shift s = shift_of(rows, double(lse[i]) - rows.z_lacks(i));
        offset.push_back(rows.map_of(i).offset);
        x.push_back(rows.row(i) + first * rows.element_size);
        shift.push_back(s.shift);
        factor.push_back(s.factor * rows.scale);
      }
      sums.assign(x.size(), 0.0);
      const int64_t at = set * rows.columns + first;
      rows.kernels->columns(x.data(), int64_t(x.size()), std::min(kColumnBlock, rows.columns - first), rows.map,
                            offset.data(), shift.data(), factor.data(), eps * rows.scale,
                            reinterpret_cast<uint8_t*>(live + at), tail + at, sums.data());
      for (int64_t i = low, k = 0; i < high; ++i) {
        if (counts(rows, lse, i)) partial[block * rows.count + i] = sums[k++];
      }
    }
  });
  for (int64_t i = 0; i < rows.count; ++i) {
    double total = counts(rows, lse, i) || rows.ignored(i) ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    for (int64_t block = 0; block < blocks; ++block) total += partial[block * rows.count + i];
    if (counts(rows, lse, i) && label_here(rows, i)) total += label_excess(rows, i, double(lse[i]));
    row_sums[i] = Acc(total);
  }
}

template <typename Acc>
void gather_grads(const Rows& rows, const Acc* lse, const Acc* row_sums, const int64_t* columns, const int64_t* offsets,
                  int64_t set_rows, char* out) {
  const int64_t size = rows.element_size;
  parallel_rows(rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t set = i / set_rows, first = offsets[set], n = offsets[set + 1] - first;
      // Earlier sets have set_rows rows of n_k + 1 numbers each.
      char* g = out + size * (set_rows * (first + set) + (i - set * set_rows) * (n + 1));
      if (!counts(rows, lse, i)) {
        std::memset(g, 0, size_t(n * size));
        store_element(rows.type, g + n * size, rows.ignored(i) ? 0.0 : std::numeric_limits<double>::quiet_NaN());
        continue;
      }
      const double own_lse = double(lse[i]) - rows.z_lacks(i);
      const Shift s = shift_of(rows, own_lse);
      double live =
          rows.kernels->gather(rows.row(i), columns + first, n, rows.map_of(i), s.shift, s.factor * rows.scale, g);
      const int64_t* last = columns + first + n;
      const int64_t* at = label_here(rows, i) ? std::lower_bound(columns + first, last, rows.labels[i]) : last;
      if (at < last && *at == rows.labels[i]) {
        const double logp = rows.map.nat * label_y(rows, i) - own_lse;
        live += label_excess(rows, i, double(lse[i]));
        store_element(rows.type, g + (at - columns - first) * size, -std::expm1(logp) * label_slope(rows, i));
      }
      store_element(rows.type, g + n * size, std::min(0.0, live - double(row_sums[i])));
    }
  });
}

// Rows [begin, end) of out; each set's columns are walked in order.
template <typename Acc>
void sum_tile(const RowKernels& kernels, ElementType type, int64_t size, int64_t begin, int64_t end, int64_t width,
              char* out, const char* tail, int64_t tail_stride, const std::vector<const void*>& terms,
              const int64_t* columns, const int64_t* offsets, const char* made) {
  const int64_t sets = int64_t(terms.size());
  std::vector<int64_t> next(sets);
  for (int64_t k = 0; k < sets; ++k) {
    next[k] = std::lower_bound(columns + offsets[k], columns + offsets[k + 1], begin) - columns;
  }
  std::vector<Acc> factors(sets);
  std::vector<const void*> rows;
  for (int64_t v = begin; v < end; ++v) {
    rows.clear();
    for (int64_t k = 0; k < sets; ++k) {
      factors[k] = Acc(load_element(type, tail + (k * tail_stride + v) * size));
      if (next[k] < offsets[k + 1] && columns[next[k]] == v) rows.push_back(made + next[k]++ * width * size);
    }
    kernels.sum_rows(out + v * width * size, width, factors.data(), terms.data(), sets, rows.data(),
                     int64_t(rows.size()));
  }
}

template <typename Acc>
void sum_all(ElementType type, int64_t size, const Tensor& out, const Tensor& tail, const Tensor& tails,
             const Tensor& columns, const int64_t* offsets, const Tensor& made) {
  const RowKernels& kernels = isa_kernels().rows[type];
  const int64_t sets = tails.size(0), width = tails.size(1), rows = tail.size(1);
  std::vector<Acc> ordered(size_t(sets * width));
  std::vector<const void*> terms;
  for (int64_t k = 0; k < sets; ++k) {
    kernels.in_lane_order(data_of<Acc>(tails) + k * width, ordered.data() + k * width, width);
    terms.push_back(ordered.data() + k * width);
  }
  parallel_rows(rows, 64, [&](int64_t begin, int64_t end) {
    sum_tile<Acc>(kernels, type, size, begin, end, width, static_cast<char*>(out.data_ptr()),
                  static_cast<const char*>(tail.data_ptr()), tail.stride(0), terms, data_of<int64_t>(columns), offsets,
                  static_cast<const char*>(made.data_ptr()));
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> live_columns(Tensor logits, Tensor labels, Tensor lse, double eps, int64_t set_rows,
                                                int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                                                Optional anchors) {
  const Rows rows = describe("live_columns", logits, labels, ignore_index, scale, softcap, vocab_size, anchors);
  check_sets("live_columns", set_rows);
  check_dtype("lse", lse, rows.acc());
  check_vector("lse", lse, rows.count);
  lse = dense(lse);
  const int64_t sets = (rows.count + set_rows - 1) / set_rows;
  Tensor live = torch::stable::new_empty(logits, {sets, rows.columns}, ScalarType::Bool);
  Tensor tail = torch::stable::new_empty(logits, {sets, rows.columns}, rows.acc());
  Tensor row_sums = new_vector(logits, rows.count, rows.acc());
  bool* flags = mutable_data_of<bool>(live);
  if (rows.type == kFloat64) {
    find_columns(rows, data_of<double>(lse), eps, set_rows, flags, mutable_data_of<double>(tail),
                 mutable_data_of<double>(row_sums));
  } else {
    find_columns(rows, data_of<float>(lse), eps, set_rows, flags, mutable_data_of<float>(tail),
                 mutable_data_of<float>(row_sums));
  }
  return {live, tail, row_sums};
}

// given_out: null if the result is to be made here.
static Tensor grads_into(const char* op, Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns,
                         Tensor offsets, int64_t set_rows, int64_t ignore_index, double scale, double softcap,
                         int64_t vocab_size, Optional anchors, const Tensor* given_out) {
  const Rows rows = describe(op, logits, labels, ignore_index, scale, softcap, vocab_size, anchors);
  check_sets(op, set_rows);
  check_row_values(lse, row_sums, rows.count, rows.acc());
  const int64_t sets = (rows.count + set_rows - 1) / set_rows;
  check_dtype("columns", columns, ScalarType::Long);
  check_dtype("offsets", offsets, ScalarType::Long);
  check_vector("offsets", offsets, sets + 1);
  lse = dense(lse), row_sums = dense(row_sums), columns = dense(columns), offsets = dense(offsets);
  const int64_t* ends = data_of<int64_t>(offsets);
  check_columns(op, data_of<int64_t>(columns), ends, sets, columns.numel(), rows.columns);
  const int64_t* ids = data_of<int64_t>(columns);
  int64_t total = 0;
  for (int64_t k = 0; k < sets; ++k) {
    total += std::min(set_rows, rows.count - k * set_rows) * (ends[k + 1] - ends[k] + 1);
  }
  Tensor out = given_out ? *given_out : torch::stable::new_empty(logits, {total}, logits.scalar_type());
  check_dtype("out", out, logits.scalar_type());
  check_vector("out", out, total);
  check(out.is_contiguous(), op, ": out must be contiguous");
  char* g = static_cast<char*>(out.mutable_data_ptr());
  if (rows.type == kFloat64) {
    gather_grads(rows, data_of<double>(lse), data_of<double>(row_sums), ids, ends, set_rows, g);
  } else {
    gather_grads(rows, data_of<float>(lse), data_of<float>(row_sums), ids, ends, set_rows, g);
  }
  return out;
}

Tensor live_grads(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                  int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                  Optional anchors) {
  return grads_into("live_grads", logits, labels, lse, row_sums, columns, offsets, set_rows, ignore_index, scale,
                    softcap, vocab_size, anchors, nullptr);
}

void live_grads_(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                 int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                 Optional anchors, Tensor out) {
  grads_into("live_grads_", logits, labels, lse, row_sums, columns, offsets, set_rows, ignore_index, scale, softcap,
             vocab_size, anchors, &out);
}

Tensor live_sum(Tensor tail, Tensor tails, Tensor made, Tensor columns, Tensor offsets) {
  check_sum_arguments("live_sum", tail, tails, made, columns, offsets);
  const int64_t sets = tail.size(0), width = tails.size(1);
  const ElementType type = element_type("live_sum", made.scalar_type());
  tails = dense(tails), made = dense(made), columns = dense(columns), offsets = dense(offsets);
  check_columns("live_sum", data_of<int64_t>(columns), data_of<int64_t>(offsets), sets, columns.numel(), tail.size(1));
  Tensor out = torch::stable::new_empty(made, {tail.size(1), width}, made.scalar_type());
  if (type == kFloat64) {
    sum_all<double>(type, 8, out, tail, tails, columns, data_of<int64_t>(offsets), made);
  } else {
    sum_all<float>(type, type == kFloat32 ? 4 : 2, out, tail, tails, columns, data_of<int64_t>(offsets), made);
  }
  return out;
}

}  // namespace cpo
