// live_columns, list_live_columns, live_grads and live_sum on the CPU: the columns of the vocabulary in which a set of
// rows has a significant gradient, the gradient there, and dW. Formulas: cpo_kernels/reference/live_columns.py.
#include <memory>
#include <numeric>

#include "live_grads.h"

namespace cpo {
namespace {

// Blocks of kColumnBlock columns of each set, which threads take one by one.
struct Blocks {
  int64_t sets, of_set, columns;
  Blocks(const Rows& rows, int64_t set_rows)
      : sets((rows.count + set_rows - 1) / set_rows),
        of_set((rows.columns + kColumnBlock - 1) / kColumnBlock),
        columns(rows.columns) {}
  // f(set, block, first, n): columns [first, first + n).
  template <typename F>
  void each(const F& f) const {
    parallel_rows(sets * of_set, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % of_set, first = block * kColumnBlock;
        f(task / of_set, block, first, std::min(kColumnBlock, columns - first));
      }
    });
  }
};

template <typename Acc>
void find_columns(const Rows& rows, const Acc* lse, double eps, int64_t set_rows, bool* live, Acc* tail,
                  Acc* row_sums) {
  const Blocks blocks(rows, set_rows);
  std::fill_n(live, blocks.sets * rows.columns, false);
  for (int64_t i = 0; i < rows.count; ++i) {
    if (counts(rows, i, lse[i]) && label_here(rows, i)) live[i / set_rows * rows.columns + rows.labels[i]] = true;
  }
  std::vector<double> partial(size_t(blocks.of_set * rows.count));  // [blocks, N], added in this order
  blocks.each([&](int64_t set, int64_t block, int64_t first, int64_t n) {
    const int64_t low = set * set_rows, high = std::min(low + set_rows, rows.count);
    std::vector<const void*> x;
    std::vector<double> offset, shift, factor;
    for (int64_t i = low; i < high; ++i) {
      if (!counts(rows, i, lse[i])) continue;
      const Shift s = shift_of(rows, double(lse[i]) - rows.z_lacks(i));
      offset.push_back(rows.map_of(i).offset);
      x.push_back(rows.row(i) + first * rows.element_size);
      shift.push_back(s.shift);
      factor.push_back(s.factor * rows.scale);
    }
    std::vector<double> sums(x.size());
    const int64_t at = set * rows.columns + first;
    rows.kernels->columns(x.data(), int64_t(x.size()), n, rows.map, offset.data(), shift.data(), factor.data(),
                          eps * rows.scale, reinterpret_cast<uint8_t*>(live + at), tail + at, sums.data());
    for (int64_t i = low, k = 0; i < high; ++i) {
      if (counts(rows, i, lse[i])) partial[block * rows.count + i] = sums[k++];
    }
  });
  for (int64_t i = 0; i < rows.count; ++i) {
    double total = counts(rows, i, lse[i]) || rows.ignored(i) ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    for (int64_t block = 0; block < blocks.of_set; ++block) total += partial[block * rows.count + i];
    if (counts(rows, i, lse[i]) && label_here(rows, i)) total += label_excess(rows, i, double(lse[i]));
    row_sums[i] = Acc(total);
  }
}

// unit * tail / total, rounded.
template <typename Acc, typename T>
void store_means(const Acc* tail, int64_t n, Acc total, Acc unit, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc mean = tail[i] / total * unit;
    if constexpr (sizeof(T) == 2) {
      from_float(out[i], float(mean));
    } else {
      out[i] = T(mean);
    }
  }
}

template <typename Acc>
void store_means(ElementType type, const Acc* tail, int64_t n, Acc total, Acc unit, void* out, int64_t at) {
  switch (type) {
    case kFloat32: return store_means(tail, n, total, unit, static_cast<float*>(out) + at);
    case kFloat64: return store_means(tail, n, total, unit, static_cast<double*>(out) + at);
    case kBFloat16: return store_means(tail, n, total, unit, static_cast<BFloat16*>(out) + at);
    default: return store_means(tail, n, total, unit, static_cast<Half*>(out) + at);
  }
}

// The live columns of all sets, their offsets, which sets are exact, q, row_sums, filter_sums, label_columns and
// label_grads: cpo_kernels/head/live.py.
using Listed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// most: live columns of a set; those with more are exact. unit: of q.
template <typename Acc>
Listed list_columns(const Rows& rows, const Tensor& logits, const Acc* lse, double eps, int64_t set_rows, int64_t most,
                    double unit) {
  const Blocks blocks(rows, set_rows);
  const int64_t sets = blocks.sets, width = rows.columns;
  const std::unique_ptr<bool[]> live(new bool[size_t(sets * width)]);
  const std::unique_ptr<Acc[]> tail(new Acc[size_t(sets * width)]);
  Tensor row_sums = new_vector(logits, rows.count, rows.acc());
  find_columns(rows, lse, eps, set_rows, live.get(), tail.get(), mutable_data_of<Acc>(row_sums));

  std::vector<int64_t> found(size_t(sets * blocks.of_set));
  std::vector<double> parts(found.size());
  blocks.each([&](int64_t set, int64_t block, int64_t first, int64_t n) {
    const int64_t at = set * width + first, task = set * blocks.of_set + block;
    double sums[8] = {};  // one would wait for itself
    int32_t count = 0;
    for (int64_t v = 0; v < n; ++v) {
      sums[v % 8] += tail[at + v];
      count += live[at + v];
    }
    found[task] = count;
    parts[task] = std::accumulate(sums, sums + 8, 0.0);
  });

  Tensor offsets = new_vector(logits, sets + 1, ScalarType::Long), exact = new_vector(logits, sets, ScalarType::Bool);
  Tensor filter_sums = new_vector(logits, 3, ScalarType::Float);
  int64_t* ends = mutable_data_of<int64_t>(offsets);
  bool* is_exact = mutable_data_of<bool>(exact);
  std::vector<double> totals(exact.numel(), 0.0);
  std::vector<int64_t> places(found.size());
  double shares[3] = {0.0, 0.0, 0.0};
  ends[0] = 0;
  for (int64_t k = 0; k < sets; ++k) {
    int64_t count = 0, labelled = 0;
    for (int64_t task = k * blocks.of_set; task < (k + 1) * blocks.of_set; ++task) {
      places[task] = ends[k] + count;
      count += found[task], totals[k] += parts[task];
    }
    is_exact[k] = count > most;
    ends[k + 1] = ends[k] + (is_exact[k] ? 0 : count);
    double nothing = 0.0;  // NaN if a row's log-sum-exp is not finite: it has no part in its set's tail
    for (int64_t i = k * set_rows; i < std::min((k + 1) * set_rows, rows.count); ++i) {
      labelled += !rows.ignored(i);
      if (!rows.ignored(i) && !std::isfinite(lse[i])) nothing = std::numeric_limits<double>::quiet_NaN();
    }
    if (is_exact[k]) {
      shares[0] += double(labelled), shares[2] += double(labelled);
    } else {
      shares[0] += double(labelled) * double(count) / double(std::max<int64_t>(1, width));
      shares[1] += (totals[k] + nothing) / rows.scale;
    }
  }
  std::copy_n(shares, 3, mutable_data_of<float>(filter_sums));

  Tensor columns = new_vector(logits, ends[sets], ScalarType::Long);
  Tensor q = torch::stable::new_empty(logits, {sets, width}, logits.scalar_type());
  int64_t* ids = mutable_data_of<int64_t>(columns);
  void* means = q.mutable_data_ptr();
  blocks.each([&](int64_t set, int64_t block, int64_t first, int64_t n) {
    const int64_t at = set * width + first;
    const Acc total = Acc(totals[set]);  // 1 / total may be infinite
    store_means(rows.type, tail.get() + at, n, total > 0 ? total : Acc(1), Acc(unit), means, at);
    if (is_exact[set]) return;
    int64_t here[kColumnBlock], count = 0;
    for (int64_t v = 0; v < n; ++v) {  // without branches, which would be mispredicted
      here[count] = first + v;
      count += live[at + v];
    }
    std::copy_n(here, count, ids + places[set * blocks.of_set + block]);
  });

  const int64_t labels = rows.anchors ? rows.count : 0;
  Tensor label_columns = new_vector(logits, labels, ScalarType::Long);
  Tensor label_grads = new_vector(logits, labels, rows.acc());
  for (int64_t i = 0; i < labels; ++i) {
    const bool here = counts(rows, i, lse[i]) && label_here(rows, i);
    const double g = here ? label_grad(rows, i, double(lse[i])) : 0.0;
    mutable_data_of<int64_t>(label_columns)[i] = std::isfinite(g) && here ? rows.labels[i] : -1;
    mutable_data_of<Acc>(label_grads)[i] = std::isfinite(g) ? Acc(g) : Acc(0);
  }
  return {columns, offsets, exact, q, row_sums, filter_sums, label_columns, label_grads};
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
      write_row(rows, i, double(lse[i]), double(row_sums[i]), columns + first, n, g);
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

static Rows rows_of_sets(const char* op, const Tensor& logits, const Tensor& labels, Tensor& lse, int64_t& set_rows,
                         int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                         const Optional& anchors) {
  const Rows rows = describe(op, logits, labels, ignore_index, scale, softcap, vocab_size, anchors);
  set_rows = check_sets(op, set_rows, rows.count);
  check_dtype("lse", lse, rows.acc());
  check_vector("lse", lse, rows.count);
  lse = dense(lse);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> live_columns(Tensor logits, Tensor labels, Tensor lse, double eps, int64_t set_rows,
                                                int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                                                Optional anchors) {
  const Rows rows =
      rows_of_sets("live_columns", logits, labels, lse, set_rows, ignore_index, scale, softcap, vocab_size, anchors);
  const int64_t sets = Blocks(rows, set_rows).sets;
  Tensor live = torch::stable::new_empty(logits, {sets, rows.columns}, ScalarType::Bool);
  Tensor tail = torch::stable::new_empty(logits, {sets, rows.columns}, rows.acc());
  Tensor row_sums = new_vector(logits, rows.count, rows.acc());
  const auto find = [&](auto acc) {
    using Acc = decltype(acc);
    find_columns(rows, data_of<Acc>(lse), eps, set_rows, mutable_data_of<bool>(live), mutable_data_of<Acc>(tail),
                 mutable_data_of<Acc>(row_sums));
  };
  rows.type == kFloat64 ? find(double{}) : find(float{});
  return {live, tail, row_sums};
}

Listed list_live_columns(Tensor logits, Tensor labels, Tensor lse, double eps, int64_t set_rows, int64_t ignore_index,
                         double scale, double softcap, int64_t vocab_size, int64_t most, double tail_unit,
                         Optional anchors) {
  const Rows rows = rows_of_sets("list_live_columns", logits, labels, lse, set_rows, ignore_index, scale, softcap,
                                 vocab_size, anchors);
  if (rows.type == kFloat64) return list_columns(rows, logits, data_of<double>(lse), eps, set_rows, most, tail_unit);
  return list_columns(rows, logits, data_of<float>(lse), eps, set_rows, most, tail_unit);
}

// given_out: null if the result is to be made here.
static Tensor grads_into(const char* op, Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns,
                         Tensor offsets, int64_t set_rows, int64_t ignore_index, double scale, double softcap,
                         int64_t vocab_size, Optional anchors, const Tensor* given_out) {
  const Rows rows = describe(op, logits, labels, ignore_index, scale, softcap, vocab_size, anchors);
  set_rows = check_sets(op, set_rows, rows.count);
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
