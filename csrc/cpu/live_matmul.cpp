// live_sums_, of which dX is made, and live_dw on CPUs with bfloat16 instructions: the matmuls of the live gradients,
// which read rows of the weight by index and add into rows of dW. Formulas: cpo_kernels/reference/live_columns.py.
#include "matmul.h"

namespace cpo {
namespace {

constexpr int64_t kDxPanels = 5, kDxPanelsByTiles = 9;  // of H per task, at most
constexpr int64_t kDwPanels = 9;                        // of H per task
constexpr int64_t kDwColumns = 256;  // of the vocabulary per task: their sums take 590 kB of the L2 cache
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

// Checks what both ops take; makes g, columns and offsets dense.
Sets describe_sets(const char* op, Tensor& g, Tensor& columns, Tensor& offsets, int64_t set_rows, int64_t rows,
                   int64_t width) {
  check(set_rows >= 1, op, ": set_rows must be at least 1, got ", set_rows);
  set_rows = std::min(set_rows, std::max<int64_t>(rows, 1));
  check_dtype("g", g, ScalarType::BFloat16);
  check_dtype("columns", columns, ScalarType::Long);
  check_dtype("offsets", offsets, ScalarType::Long);
  Sets sets{(rows + set_rows - 1) / set_rows, rows, set_rows};
  check_vector("offsets", offsets, sets.count + 1);
  g = dense(g), columns = dense(columns), offsets = dense(offsets);
  sets.g = data_of<BFloat16>(g), sets.columns = data_of<int64_t>(columns), sets.offsets = data_of<int64_t>(offsets);
  check_columns(op, sets.columns, sets.offsets, sets.count, columns.numel(), width);
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

// g_A W_A of the rows of a set, in `width` columns.
void sums_by_tiles(const Bf16Matmul& matmul, const Sets& sets, int64_t k, const BFloat16* weight, int64_t weight_stride,
                   const Labels& labels, int64_t width, float* out, int64_t out_stride, Lines<float>& sums,
                   Lines<uint32_t>& packed) {
  const int64_t live = sets.live(k), size = sets.size(k), row_tiles = tiles_of(size), wide = steps_of(width);
  const int64_t of_sums = row_tiles * wide * 2 * kTile * kTile, of_b = wide * kPairOfTiles * kStep / 2;
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
  for (int64_t j = 0; j < live; j += kStep) {
    const int64_t some = std::min(kStep, live - j);
    const int64_t* columns = sets.columns + sets.offsets[k] + j;
    for (int64_t i = 0; i < some; ++i) lines[i] = weight + columns[i] * weight_stride;
    matmul.tiles_of_b(lines, some, 0, width, b);
    matmul.tiles_of_rows(sets.grads(k) + j, live + 1, size, some, a);
    matmul.add_tiles(a, b, row_tiles, tiles_of(width), steps_of(some), sums.data());
  }
  for (int64_t t = 0; t < size; ++t) {
    tiles.get(t, width, line);
    std::copy_n(line, width, out + t * out_stride);
  }
}

void sums_by_panels(const Bf16Matmul& matmul, const Sets& sets, int64_t k, const BFloat16* weight,
                    int64_t weight_stride, const Labels& labels, int64_t width, float* out, int64_t out_stride,
                    Lines<float>& sums, Lines<uint32_t>& packed) {
  const int64_t live = sets.live(k), size = sets.size(k), panels = panels_of(width), stride = panels * kPanel;
  const BFloat16* g = sets.grads(k);
  sums.assign(size_t(size * stride), 0.0f);
  packed.resize(size_t(kPackedPairs * stride));
  std::vector<float*> rows(size);
  for (int64_t t = 0; t < size; ++t) {
    rows[t] = sums.data() + t * stride;
    begin_row(matmul, sets, k, t, weight, weight_stride, labels, width, rows[t]);
  }
  for (int64_t j = 0; j < live; j += 2 * kPackedPairs) {
    const int64_t pairs = (std::min(2 * kPackedPairs, live - j) + 1) / 2;
    const int64_t* columns = sets.columns + sets.offsets[k] + j;
    for (int64_t p = 0; p < pairs; ++p) {
      for (int64_t i = 2 * (p + kAhead); i < std::min(2 * (p + kAhead + 1), live - j); ++i) {
        prefetch(weight + columns[i] * weight_stride, width);
      }
      // Behind an odd number of columns comes tau, which is multiplied by a row of zeros.
      const bool both = j + 2 * p + 1 < live;
      matmul.pack_pairs(weight + columns[2 * p] * weight_stride,
                        both ? weight + columns[2 * p + 1] * weight_stride : nullptr, width, packed.data() + p * kPanel,
                        pairs * kPanel);
    }
    matmul.add(g + j, 2 * (live + 1), 4, size, packed.data(), pairs, panels, rows.data());
  }
  for (int64_t t = 0; t < size; ++t) std::copy_n(rows[t], width, out + t * out_stride);
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
  const Bf16Matmul& kernels = bf16_matmul("live_sums_");
  check_bf16_matrix("live_sums_", "weight", weight);
  const int64_t rows = out.dim() ? out.size(0) : 0, width = weight.size(1), stride = weight.stride(0);
  check_dtype("out", out, ScalarType::Float);
  check_matrix("out", out, rows, width);
  check(out.is_contiguous(), "live_sums_: out must be contiguous");
  const Sets sets = describe_sets("live_sums_", g, columns, offsets, set_rows, rows, weight.size(0));
  const Labels labels("live_sums_", label_columns, label_grads, rows, weight.size(0));
  if (rows == 0 || width == 0) return;
  float* sums = mutable_data_of<float>(out);
  const BFloat16* w = data_of<BFloat16>(weight);
  const auto compute = kernels.add_tiles ? sums_by_tiles : sums_by_panels;
  const int64_t most = kernels.add_tiles ? kDxPanelsByTiles : kDxPanels;
  const int64_t step = panels_per_task(width, sets.count, most) * kPanel, parts = (width + step - 1) / step;
  // Sets change fastest: the part of W that a few of them need may stay in the cache.
  share_tasks(parts * sets.count, [&](const auto& take) {
    Lines<float> own;
    Lines<uint32_t> packed;
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t k = task % sets.count, first = task / sets.count * step;
      compute(kernels, sets, k, w + first, stride, labels, std::min(step, width - first),
              sums + sets.low(k) * width + first, width, own, packed);
    }
  });
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
