// live_sums_ and live_sums_of_logits_, of which dX is made, and live_dw on CPUs with bfloat16 instructions: the matmuls
// of the live gradients, which read rows of the weight by index and add into rows of dW. Formulas:
// cpo_kernels/reference/live_columns.py.
#include "live_grads.h"
#include "matmul.h"

namespace cpo {
namespace {

constexpr int64_t kDxPanels = 5, kDxPanelsByTiles = 9;  // of H per task, at most
constexpr int64_t kMadeColumns = 1024;                  // of H: the sums of a set, in the L2 cache
constexpr int64_t kDwPanels = 9;                        // of H per task
constexpr int64_t kDwColumns = 256;  // of the vocabulary per task: their sums take 590 kB of the L2 cache
static_assert(kGather % kStep == 0);
constexpr int64_t kAhead = 4;  // pairs of rows of W to prefetch: 26 sets of SmolLM2 took 1.2 times as long without

// Some of the live columns of a set.
struct Span {
  int64_t first, count;
};

struct Sets {
  int64_t count, rows, set_rows;
  const BFloat16* g;
  const int64_t *columns, *offsets;

  int64_t low(int64_t k) const { return k * set_rows; }
  int64_t size(int64_t k) const { return std::min(set_rows, rows - k * set_rows); }
  int64_t live(int64_t k) const { return offsets[k + 1] - offsets[k]; }
  // Those in [low, high); none beyond the last set.
  Span span(int64_t k, int64_t low, int64_t high) const {
    if (k >= count) return {0, 0};
    const int64_t *begin = columns + offsets[k], *end = columns + offsets[k + 1];
    const int64_t* from = std::lower_bound(begin, end, low);
    return {from - begin, std::lower_bound(from, end, high) - from};
  }
  const BFloat16* grads(int64_t k) const { return g + set_rows * (offsets[k] + k); }  // [size(k), live(k) + 1]
};

// Checks where the sets lie; makes columns and offsets dense.
Sets describe_places(const char* op, Tensor& columns, Tensor& offsets, int64_t set_rows, int64_t rows, int64_t width) {
  set_rows = check_sets(op, set_rows, rows);
  check_dtype("columns", columns, ScalarType::Long);
  check_dtype("offsets", offsets, ScalarType::Long);
  Sets sets{(rows + set_rows - 1) / set_rows, rows, set_rows};
  check_vector("offsets", offsets, sets.count + 1);
  columns = dense(columns), offsets = dense(offsets);
  sets.columns = data_of<int64_t>(columns), sets.offsets = data_of<int64_t>(offsets);
  check_columns(op, sets.columns, sets.offsets, sets.count, columns.numel(), width);
  return sets;
}

// The same, and their gradients.
Sets describe_sets(const char* op, Tensor& g, Tensor& columns, Tensor& offsets, int64_t set_rows, int64_t rows,
                   int64_t width) {
  Sets sets = describe_places(op, columns, offsets, set_rows, rows, width);
  check_dtype("g", g, ScalarType::BFloat16);
  g = dense(g);
  sets.g = data_of<BFloat16>(g);
  int64_t total = 0;
  for (int64_t k = 0; k < sets.count; ++k) total += sets.size(k) * (sets.live(k) + 1);
  check_vector("g", g, total);
  return sets;
}

// The gradient of a row's label is known more exactly than g holds it: column [rows], none below 0, and value [rows].
struct Labels {
  const int64_t* column = nullptr;
  const float* value;

  Labels(const char* op, Tensor& columns, Tensor& values, int64_t rows, int64_t width) {
    if (!given(columns)) return;
    check_dtype("label_columns", columns, ScalarType::Long);
    check_dtype("label_grads", values, ScalarType::Float);
    check_vector("label_columns", columns, rows);
    check_vector("label_grads", values, rows);
    columns = dense(columns), values = dense(values);
    column = data_of<int64_t>(columns), value = data_of<float>(values);
    for (int64_t t = 0; t < rows; ++t) {
      check(column[t] < width, op, ": label_columns must lie below ", width, ", got ", column[t], " at row ", t);
    }
  }
  bool here(int64_t t) const { return column && column[t] >= 0; }
  float rounded(int64_t t) const {
    BFloat16 stored;
    from_float(stored, value[t]);
    return to_float(stored);
  }
};

const float* row_factors(const char* name, Tensor& factors, int64_t rows) {
  check_dtype(name, factors, ScalarType::Float);
  check_vector(name, factors, rows);
  factors = dense(factors);
  return data_of<float>(factors);
}

// What the rounded gradient of the label of row t of a set takes away, times its row of the weight.
void begin_row(const Bf16Matmul& matmul, const Sets& sets, int64_t k, int64_t t, const BFloat16* weight,
               int64_t weight_stride, const Labels& labels, int64_t width, float* sums) {
  const int64_t row = sets.low(k) + t;
  std::fill_n(sums, width, 0.0f);
  if (!labels.here(row)) return;
  const float error = labels.value[row] - labels.rounded(row);
  matmul.add_row(weight + labels.column[row] * weight_stride, width, error, 0.0f, 0.0f, sums);
}

// Gradients of a set's rows in some of its live columns: the first, and the numbers from row to row. Behind the last
// column stands tau.
struct Block {
  const BFloat16* g;
  int64_t stride;
};

struct Kept {
  const BFloat16* g;  // [size, live + 1]
  int64_t live;

  Block operator()(int64_t first, int64_t) const { return {g + first, live + 1}; }
  float tau(int64_t t) const { return to_float(g[t * (live + 1) + live]); }
};

// Made of the logits, and nowhere else: written and read in the cache.
class Made {
 public:
  Made(const Rows& rows, const Sets& sets, int64_t k, const float* lse, const float* row_sums)
      : block_(size_t(sets.size(k) * kStride)), row_sums_(row_sums + sets.low(k)) {
    for (int64_t row = sets.low(k); row < sets.low(k) + sets.size(k); ++row) {
      rows_.emplace_back(rows, row, double(lse[row]), sets.columns + sets.offsets[k], sets.live(k));
    }
  }
  Block operator()(int64_t first, int64_t n) {
    [[maybe_unused]] const WithoutSubnormals flushed;  // as in live_grads
    for (size_t t = 0; t < rows_.size(); ++t) {
      BFloat16* g = block_.data() + int64_t(t) * kStride;
      if (t + kRowsAhead < rows_.size()) rows_[t + kRowsAhead].prefetch(first, n);
      rows_[t].write(first, n, g);
      g[n] = stored_tau(t);
    }
    return {block_.data(), kStride};
  }
  float tau(int64_t t) const { return to_float(stored_tau(size_t(t))); }

 private:
  BFloat16 stored_tau(size_t t) const {  // as live_grads stores it
    [[maybe_unused]] const WithoutSubnormals flushed;
    BFloat16 stored;
    from_float(stored, float(rows_[t].tau(double(row_sums_[t]))));
    return stored;
  }
  static constexpr size_t kRowsAhead = 2;
  static constexpr int64_t kStride = kGather + 32;  // 31 cache lines
  std::vector<RowGrads> rows_;
  Lines<BFloat16> block_;
  const float* row_sums_;
};

// g_A W_A of the rows of a set, in `width` columns. grads(first, n): a Block, of kGather columns or what is left.
// store(t, sums): of a row, which may be overwritten.
template <typename Grads, typename Store>
void sums_by_tiles(const Bf16Matmul& matmul, const Sets& sets, int64_t k, Grads& grads, const BFloat16* weight,
                   int64_t weight_stride, const Labels& labels, int64_t width, const Store& store, Lines<float>& sums,
                   Lines<uint32_t>& packed) {
  const int64_t live = sets.live(k), size = sets.size(k), row_tiles = tiles_of(size), wide = steps_of(width);
  const int64_t of_pair = row_tiles * 2 * kTile * kTile, part = std::min(width, kDxPanelsByTiles * kPanel);
  const int64_t of_sums = wide * of_pair, of_b = steps_of(part) * kPairOfTiles * kStep / 2;
  sums.assign(size_t(of_sums + wide * kPairOfTiles), 0.0f);
  packed.resize(size_t(of_b + row_tiles * kTile * kStep / 2));
  const TileSums tiles{sums.data(), row_tiles};
  float* line = sums.data() + of_sums;
  uint32_t *b = packed.data(), *a = b + of_b;
  for (int64_t t = 0; t < size; ++t) {
    begin_row(matmul, sets, k, t, weight, weight_stride, labels, width, line);
    tiles.put(line, t, width);
  }
  const BFloat16* lines[kStep];
  Block g{};
  for (int64_t j = 0; j < live; j += kStep) {
    const int64_t some = std::min(kStep, live - j);
    const int64_t* columns = sets.columns + sets.offsets[k] + j;
    for (int64_t i = 0; i < some; ++i) lines[i] = weight + columns[i] * weight_stride;
    if (j % kGather == 0) g = grads(j, std::min(kGather, live - j));
    matmul.tiles_of_rows(g.g + j % kGather, g.stride, size, some, a);
    for (int64_t first = 0; first < width; first += part) {
      const int64_t n = std::min(part, width - first);
      matmul.tiles_of_b(lines, some, first, n, b);
      matmul.add_tiles(a, b, row_tiles, tiles_of(n), steps_of(some), sums.data() + first / kPairOfTiles * of_pair);
    }
  }
  for (int64_t t = 0; t < size; ++t) {
    tiles.get(t, width, line);
    store(t, line);
  }
}

template <typename Grads, typename Store>
void sums_by_panels(const Bf16Matmul& matmul, const Sets& sets, int64_t k, Grads& grads, const BFloat16* weight,
                    int64_t weight_stride, const Labels& labels, int64_t width, const Store& store, Lines<float>& sums,
                    Lines<uint32_t>& packed) {
  const int64_t live = sets.live(k), size = sets.size(k), stride = panels_of(width) * kPanel;
  const int64_t part = std::min(stride, kDxPanels * kPanel);
  sums.assign(size_t(size * stride), 0.0f);
  packed.resize(size_t(kPackedPairs * part));
  std::vector<float*> rows(size), of_part(size);
  for (int64_t t = 0; t < size; ++t) {
    rows[t] = sums.data() + t * stride;
    begin_row(matmul, sets, k, t, weight, weight_stride, labels, width, rows[t]);
  }
  Block g{};
  for (int64_t j = 0, end = 0; j < live; j = end) {
    if (j % kGather == 0) g = grads(j, std::min(kGather, live - j));
    end = std::min({j + 2 * kPackedPairs, j - j % kGather + kGather, live});
    const int64_t pairs = (end - j + 1) / 2;
    const int64_t* columns = sets.columns + sets.offsets[k] + j;
    for (int64_t first = 0; first < width; first += part) {
      const int64_t n = std::min(part, width - first);
      for (int64_t p = 0; p < pairs; ++p) {
        for (int64_t i = 2 * (p + kAhead); i < std::min(2 * (p + kAhead + 1), live - j); ++i) {
          prefetch(weight + columns[i] * weight_stride + first, n);
        }
        // Behind an odd number of columns comes tau, which is multiplied by a row of zeros.
        const bool both = j + 2 * p + 1 < live;
        matmul.pack_pairs(weight + columns[2 * p] * weight_stride + first,
                          both ? weight + columns[2 * p + 1] * weight_stride + first : nullptr, n,
                          packed.data() + p * kPanel, pairs * kPanel);
      }
      for (int64_t t = 0; t < size; ++t) of_part[t] = rows[t] + first;
      matmul.add(g.g + j % kGather, 2 * g.stride, 4, size, packed.data(), pairs, panels_of(n), of_part.data());
    }
  }
  for (int64_t t = 0; t < size; ++t) store(t, rows[t]);
}

// Columns [first, first + n) of H, of a set.
struct DxTask {
  int64_t k, first, n;
};

// Columns of H per task if all sets have the same.
int64_t dx_columns(const Bf16Matmul& kernels, int64_t width, int64_t sets) {
  return panels_per_task(width, sets, kernels.add_tiles ? kDxPanelsByTiles : kDxPanels) * kPanel;
}

// Sets [low, high) in parts of `step` columns. Sets change fastest: the part of W that a few of them need may stay in
// the cache.
void add_tasks(std::vector<DxTask>& tasks, int64_t low, int64_t high, int64_t width, int64_t step) {
  for (int64_t first = 0; first < width; first += step) {
    for (int64_t k = low; k < high; ++k) tasks.push_back({k, first, std::min(step, width - first)});
  }
}

// grads_of(k): Kept or Made. store(row, first, n, sums, tau): columns of g_A W_A of a row, which may be overwritten.
template <typename GradsOf, typename Store>
void dx_tasks(const Bf16Matmul& kernels, const Sets& sets, const std::vector<DxTask>& tasks, const Tensor& weight,
              const Labels& labels, const GradsOf& grads_of, const Store& store) {
  const BFloat16* w = data_of<BFloat16>(weight);
  const int64_t stride = weight.stride(0);
  share_tasks(int64_t(tasks.size()), [&](const auto& take) {
    Lines<float> sums;
    Lines<uint32_t> packed;
    for (int64_t i; (i = take()) >= 0;) {
      const auto [k, first, n] = tasks[i];
      auto grads = grads_of(k);
      const auto store_row = [&, k = k, first = first, n = n](int64_t t, float* line) {
        store(sets.low(k) + t, first, n, line, grads.tau(t));
      };
      kernels.add_tiles
          ? sums_by_tiles(kernels, sets, k, grads, w + first, stride, labels, n, store_row, sums, packed)
          : sums_by_panels(kernels, sets, k, grads, w + first, stride, labels, n, store_row, sums, packed);
    }
  });
}

// Rows of a matrix in pairs, as the second operand of Bf16Matmul::add: [panels, pairs, kPanel]; or in tiles.
void pack_rows(const Bf16Matmul& matmul, const std::vector<const BFloat16*>& rows, int64_t width, uint32_t* out) {
  const int64_t count = int64_t(rows.size()), pairs = (count + 1) / 2;
  if (matmul.tiles_of_b) {
    matmul.tiles_of_b(rows.data(), count, 0, width, out);
    return;
  }
  for (int64_t p = 0; p < pairs; ++p) {
    matmul.pack_pairs(rows[2 * p], 2 * p + 1 < count ? rows[2 * p + 1] : nullptr, width, out + p * kPanel,
                      pairs * kPanel);
  }
}

// Numbers of `pack_rows` for a panel.
int64_t panel_size(int64_t rows) { return steps_of(rows) * kTile * kPanel; }

// The operands of dW that all tasks share.
struct Packed {
  int64_t width, panels;
  Lines<uint32_t> x;  // of set k from k * set_stride
  int64_t set_stride;
  Lines<uint32_t> tails;  // rounded, then the rounding errors: 16 bits of float32's 24
};

Packed pack(const Bf16Matmul& matmul, const Sets& sets, const BFloat16* x, const float* coef, const float* tails,
            int64_t width) {
  Packed packed;
  packed.width = width, packed.panels = panels_of(width);
  packed.set_stride = packed.panels * panel_size(sets.set_rows);
  packed.x.resize(size_t(sets.count * packed.set_stride));
  share_tasks(sets.count, [&](const auto& take) {
    std::vector<BFloat16> scaled(size_t(sets.set_rows * width));
    for (int64_t k; (k = take()) >= 0;) {
      std::vector<const BFloat16*> rows;
      for (int64_t t = 0; t < sets.size(k); ++t) {
        const int64_t row = sets.low(k) + t;
        rows.push_back(scaled.data() + t * width);
        matmul.scale_row(x + row * width, width, coef[row], scaled.data() + t * width);
      }
      pack_rows(matmul, rows, width, packed.x.data() + k * packed.set_stride);
    }
  });
  const int64_t numbers = sets.count * width;
  std::vector<BFloat16> parts(size_t(2 * numbers));
  for (int64_t i = 0; i < numbers; ++i) {
    from_float(parts[i], tails[i]);
    from_float(parts[numbers + i], tails[i] - to_float(parts[i]));
  }
  std::vector<const BFloat16*> rows;
  for (int64_t k = 0; k < 2 * sets.count; ++k) rows.push_back(parts.data() + k * width);
  packed.tails.resize(size_t(packed.panels * panel_size(2 * sets.count)));
  pack_rows(matmul, rows, width, packed.tails.data());
  return packed;
}

// Rows t of x, their coefficients, and the rows in the order of their labels.
struct LabelRows {
  const BFloat16* x;
  const float* coef;
  const Labels* labels;
  std::vector<int64_t> order;

  LabelRows(const BFloat16* x, const float* coef, const Labels& labels, int64_t rows)
      : x(x), coef(coef), labels(&labels) {
    for (int64_t t = 0; t < rows; ++t) {
      if (labels.here(t)) order.push_back(t);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return labels.column[a] < labels.column[b]; });
  }
  // To the sums of columns [low, high), what the rounded products of their labels lack.
  void add(const Bf16Matmul& matmul, int64_t low, int64_t high, int64_t width, int64_t first, int64_t n, float* sums,
           int64_t stride) const {
    const auto from =
        std::partition_point(order.begin(), order.end(), [&](int64_t t) { return labels->column[t] < low; });
    for (auto at = from; at < order.end() && labels->column[*at] < high; ++at) {
      const int64_t t = *at;
      matmul.add_row(x + t * width + first, n, coef[t] * labels->value[t], labels->rounded(t), coef[t],
                     sums + (labels->column[t] - low) * stride);
    }
  }
};

// Rows [low, high) of dW, and `panels` panels of its columns from the panel `first`.
void dw_task(const Bf16Matmul& matmul, const Sets& sets, const Packed& packed, const LabelRows& labels,
             const BFloat16* tail, int64_t tail_stride, int64_t low, int64_t high, int64_t first, int64_t panels,
             BFloat16* out, Lines<float>& sums, Lines<uint32_t>& pairs_of_g) {
  const int64_t stride = panels * kPanel;
  sums.assign(size_t((high - low) * stride), 0.0f);
  std::vector<float*> rows(size_t(high - low));
  std::vector<const BFloat16*> lines;
  // Columns [from, from + n) of the lines, turned, times x: rows of dW.
  const auto add = [&](int64_t from, int64_t n, const uint32_t* x) {
    if (!n) return;
    const int64_t count = int64_t(lines.size()), pairs = (count + 1) / 2, row = panels_of(n) * kPanel;
    pairs_of_g.resize(size_t(steps_of(count) * kTile * row));
    if (matmul.add_tiles_to_rows) {
      matmul.tiles_of_columns(lines.data(), count, from, n, pairs_of_g.data());
      matmul.add_tiles_to_rows(pairs_of_g.data(), x + first * kPanel * steps_of(count) * kTile, n,
                               tiles_of(std::min(stride, packed.width - first * kPanel)), steps_of(count), rows.data());
      return;
    }
    for (int64_t p = 0; p < pairs; ++p) {
      const BFloat16* odd = 2 * p + 1 < count ? lines[2 * p + 1] + from : nullptr;
      matmul.pack_pairs(lines[2 * p] + from, odd, n, pairs_of_g.data() + p * row, kPanel);
    }
    matmul.add(pairs_of_g.data(), 4, 4 * row, n, x + first * pairs * kPanel, pairs, panels, rows.data());
  };
  for (int64_t v = low; v < high; ++v) rows[v - low] = sums.data() + (v - low) * stride;
  for (int64_t k = 0; k < 2 * sets.count; ++k) lines.push_back(tail + k % sets.count * tail_stride);
  add(low, high - low, packed.tails.data());
  Span span = sets.span(0, low, high);
  for (int64_t k = 0; k < sets.count; ++k) {
    const Span next = sets.span(k + 1, low, high);  // its rows of g are 1.4 to 4 cache lines each, far apart
    for (int64_t t = 0; next.count && t < sets.size(k + 1); ++t) {
      prefetch(sets.grads(k + 1) + t * (sets.live(k + 1) + 1) + next.first, next.count + 31);
    }
    const int64_t* columns = sets.columns + sets.offsets[k] + span.first;
    for (int64_t i = 0; i < span.count; ++i) rows[i] = sums.data() + (columns[i] - low) * stride;
    lines.clear();
    for (int64_t t = 0; t < sets.size(k); ++t) lines.push_back(sets.grads(k) + t * (sets.live(k) + 1));
    add(span.first, span.count, packed.x.data() + k * packed.set_stride);
    span = next;
  }
  const int64_t column = first * kPanel, n = std::min(stride, packed.width - column);
  labels.add(matmul, low, high, packed.width, column, n, sums.data(), stride);
  for (int64_t v = low; v < high; ++v) {
    matmul.round_row(sums.data() + (v - low) * stride, n, 1.0f, out + v * packed.width + column);
  }
}

}  // namespace

void live_sums_(Tensor g, Tensor columns, Tensor offsets, int64_t set_rows, Tensor weight, Tensor label_columns,
                Tensor label_grads, Tensor out) {
  const char* op = "live_sums_";
  const Bf16Matmul& kernels = bf16_matmul(op);
  check_bf16_matrix(op, "weight", weight);
  const int64_t rows = out.dim() ? out.size(0) : 0, width = weight.size(1);
  check_dtype("out", out, ScalarType::Float);
  check_matrix("out", out, rows, width);
  check(out.is_contiguous(), op, ": out must be contiguous");
  const Sets sets = describe_sets(op, g, columns, offsets, set_rows, rows, weight.size(0));
  const Labels labels(op, label_columns, label_grads, rows, weight.size(0));
  if (rows == 0 || width == 0) return;
  float* sums = mutable_data_of<float>(out);
  std::vector<DxTask> tasks;
  add_tasks(tasks, 0, sets.count, width, dx_columns(kernels, width, sets.count));
  dx_tasks(
      kernels, sets, tasks, weight, labels, [&](int64_t k) { return Kept{sets.grads(k), sets.live(k)}; },
      [&](int64_t row, int64_t first, int64_t n, const float* line, float) {
        std::copy_n(line, n, sums + row * width + first);
      });
}

void live_sums_of_logits_(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                          int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                          Optional anchors, Tensor weight, Tensor label_columns, Tensor label_grads, Tensor means,
                          Tensor coef, Tensor room, Tensor out, Tensor tau) {
  const char* op = "live_sums_of_logits_";
  const Bf16Matmul& kernels = bf16_matmul(op);
  check_bf16_matrix(op, "weight", weight);
  check_bf16_matrix(op, "logits", logits);
  const Rows rows = describe(op, logits, labels, ignore_index, scale, softcap, vocab_size, anchors);
  const int64_t width = weight.size(1);
  check(weight.size(0) >= vocab_size, op, ": weight must have the ", vocab_size, " rows of the vocabulary, got ",
        weight.size(0));
  const Sets sets = describe_places(op, columns, offsets, set_rows, rows.count, vocab_size);
  const Labels of_labels(op, label_columns, label_grads, rows.count, vocab_size);
  check_row_values(lse, row_sums, rows.count, ScalarType::Float);
  lse = dense(lse), row_sums = dense(row_sums);
  const bool whole = given(means), rounds = out.scalar_type() == ScalarType::BFloat16;
  if (whole) {
    check_dtype("means", means, ScalarType::Float);
    check_matrix("means", means, sets.count, width);
    means = dense(means);
  }
  check(whole || !given(coef), op, ": coef needs means");
  const float* factors = given(coef) ? row_factors("coef", coef, rows.count) : nullptr;
  check_dtype("out", out, rounds && whole ? ScalarType::BFloat16 : ScalarType::Float);
  check_matrix("out", out, rows.count, width);
  check_dtype("tau", tau, ScalarType::Float);
  check_vector("tau", tau, rows.count);
  check(out.is_contiguous() && tau.is_contiguous(), op, ": out and tau must be contiguous");
  check_dtype("room", room, ScalarType::BFloat16);
  if (rows.count == 0 || width == 0) return;
  const float *given_lse = data_of<float>(lse), *totals = data_of<float>(row_sums);
  const float* mean_rows = whole ? data_of<float>(means) : nullptr;
  float* taus = mutable_data_of<float>(tau);
  const auto store = [&](int64_t row, int64_t first, int64_t n, float* line, float of_tail) {
    if (first == 0) taus[row] = of_tail;
    const float factor = factors ? factors[row] : 1.0f;
    if (whole) {
      const float* mean = mean_rows + row / sets.set_rows * width + first;
      for (int64_t i = 0; i < n; ++i) line[i] += of_tail * mean[i];
    }
    if (rounds) {
      kernels.round_row(line, n, factor, mutable_data_of<BFloat16>(out) + row * width + first);
    } else {
      float* to = mutable_data_of<float>(out) + row * width + first;
      for (int64_t i = 0; i < n; ++i) to[i] = factor * line[i];
    }
  };
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<DxTask> tasks;
  if (sets.count >= threads && width <= kMadeColumns) {
    // A task for each set, and two or more for each of the last ones, which make its gradients twice or more.
    const int64_t last = sets.count - sets.count % threads;
    add_tasks(tasks, 0, last, width, width);
    add_tasks(tasks, last, sets.count, width, dx_columns(kernels, width, sets.count - last));
    const auto made = [&](int64_t k) { return Made(rows, sets, k, given_lse, totals); };
    dx_tasks(kernels, sets, tasks, weight, of_labels, made, store);
    return;
  }
  // As many sets at a time as `room` holds.
  const int64_t* ends = sets.offsets;
  for (int64_t low = 0, high = 0; low < sets.count; low = high) {
    int64_t size = 0;
    for (; high < sets.count; ++high) {
      const int64_t more = sets.size(high) * (sets.live(high) + 1);
      if (size + more > room.numel()) break;
      size += more;
    }
    check(high > low, op, ": room must hold the gradients of a set, ", sets.size(low) * (sets.live(low) + 1),
          " numbers, got ", room.numel());
    const auto place = [&, low = low](int64_t k) {
      return mutable_data_of<BFloat16>(room) + sets.set_rows * (ends[k] - ends[low] + k - low);
    };
    const int64_t first = sets.low(low), some = std::min(sets.low(high), rows.count) - first;
    parallel_rows(some, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = first + begin; row < first + end; ++row) {
        const int64_t k = row / sets.set_rows, n = sets.live(k);
        write_row(rows, row, double(given_lse[row]), double(totals[row]), sets.columns + ends[k], n,
                  place(k) + (row - sets.low(k)) * (n + 1));
      }
    });
    tasks.clear();
    add_tasks(tasks, low, high, width, dx_columns(kernels, width, high - low));
    dx_tasks(kernels, sets, tasks, weight, of_labels, [&](int64_t k) { return Kept{place(k), sets.live(k)}; }, store);
  }
}

Tensor live_dw(Tensor g, Tensor columns, Tensor offsets, int64_t set_rows, Tensor x, Tensor coef, Tensor tail,
               Tensor tails, Tensor label_columns, Tensor label_grads, int64_t rows) {
  const Bf16Matmul& kernels = bf16_matmul("live_dw");
  check_bf16_matrix("live_dw", "x", x);
  check_bf16_matrix("live_dw", "tail", tail);
  check_dtype("tails", tails, ScalarType::Float);
  const int64_t vocab = tail.size(1), width = x.size(1);
  const Sets sets = describe_sets("live_dw", g, columns, offsets, set_rows, x.size(0), vocab);
  check_matrix("tail", tail, sets.count, vocab);
  check_matrix("tails", tails, sets.count, width);
  x = dense(x), tails = dense(tails);
  const float* factors = row_factors("coef", coef, x.size(0));
  const Labels labels("live_dw", label_columns, label_grads, x.size(0), vocab);
  const LabelRows by_label(data_of<BFloat16>(x), factors, labels, x.size(0));
  const Packed packed = pack(kernels, sets, data_of<BFloat16>(x), factors, data_of<float>(tails), width);
  check(rows >= vocab, "live_dw: dW must have at least the ", vocab, " rows of the vocabulary, got ", rows);
  Tensor dw = torch::stable::new_empty(g, {rows, width}, ScalarType::BFloat16);
  BFloat16* out = mutable_data_of<BFloat16>(dw);
  prefer_huge_pages(out, 2 * rows * width, 2 * rows * width);
  std::fill_n(out + vocab * width, (rows - vocab) * width, BFloat16{0});
  const BFloat16* q = data_of<BFloat16>(tail);
  const int64_t stride = tail.stride(0), parts = (packed.panels + kDwPanels - 1) / kDwPanels;
  const int64_t tiles = (vocab + kDwColumns - 1) / kDwColumns;
  // Frequent words have small numbers: their tiles, which take longest, come first.
  share_tasks(tiles * parts, [&](const auto& take) {
    Lines<float> sums;
    Lines<uint32_t> pairs_of_g;
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t low = task / parts * kDwColumns, first = task % parts * kDwPanels;
      dw_task(kernels, sets, packed, by_label, q, stride, low, std::min(low + kDwColumns, vocab), first,
              std::min(kDwPanels, packed.panels - first), out, sums, pairs_of_g);
    }
  });
  return dw;
}

}  // namespace cpo
