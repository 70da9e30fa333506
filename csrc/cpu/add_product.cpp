// add_product_: adds the product a b of bfloat16 matrices to sums in float32, in float32 kept as two 16-bit halves, or
// in bfloat16 rounded once.
#include "matmul.h"

namespace cpo {

bool has_bf16_matmuls() { return isa_kernels().matmul.logits != nullptr; }
bool has_tiles() { return isa_kernels().matmul.add_tiles != nullptr; }

const Bf16Matmul& bf16_matmul(const char* op) {
  const Bf16Matmul& found = isa_kernels().matmul;
  check(found.logits, op,
        ": the CPU's own matmuls need a processor with AVX512_BF16, and CPO_KERNELS_CPU_ISA unset, avx512 or amx");
  return found;
}

namespace {

// Without AMX: sums per task, at most 330 kB. b is packed for each task, or, where there are many tasks and all of b
// stays in a cache, once for all of them: dW of 1024 x 576 x 49,152 takes 77 ms then, and 79 with 256 rows and 5 panels
// (two cores; torch cannot add to float32: a rounded product and the addition take 130).
struct SumTile {
  int64_t rows, panels;
};
constexpr SumTile kOwnB{256, 5}, kSharedB{128, 9};
constexpr int64_t kSharedRows = 2048, kSharedNumbers = int64_t(4) << 20;

// a [rows, inner] with unit stride in one of its dimensions, as operands of Bf16Matmul::add.
struct Left {
  const BFloat16* a;
  int64_t stride;
  bool transposed;  // unit stride over its rows

  // To the sums of rows [low, low + count), numbers [k, k + n) of the inner dimension.
  void add(const Bf16Matmul& kernels, int64_t low, int64_t count, int64_t k, int64_t n, const uint32_t* b,
           int64_t panels, float* const* lines, Lines<uint32_t>& pairs_of_a) const {
    const int64_t pairs = (n + 1) / 2;
    if (!transposed && n % 2 == 0) {
      kernels.add(a + low * stride + k, 2 * stride, 4, count, b, pairs, panels, lines);
      return;
    }
    const int64_t row = panels_of(count) * kPanel;
    pairs_of_a.resize(size_t(pairs * row));
    for (int64_t p = 0; p < pairs; ++p) {
      uint32_t* to = pairs_of_a.data() + p * row;
      if (transposed) {
        const BFloat16* one = a + (k + 2 * p) * stride + low;
        kernels.pack_pairs(one, 2 * p + 1 < n ? one + stride : nullptr, count, to, kPanel);
        continue;
      }
      for (int64_t t = 0; t < count; ++t) {  // behind the last number of a row there may be none
        const BFloat16* one = a + (low + t) * stride + k + 2 * p;
        to[t] = one[0].bits | (2 * p + 1 < n ? uint32_t(one[1].bits) << 16 : 0);
      }
    }
    kernels.add(pairs_of_a.data(), 4, 4 * row, count, b, pairs, panels, lines);
  }
};

// b [inner, width] as operands of Bf16Matmul::add, 2 * kPackedPairs of its rows at a time: [panels, pairs, kPanel].
struct Right {
  const BFloat16* b;
  int64_t stride, inner, width;

  int64_t pairs_from(int64_t k) const { return (std::min(2 * kPackedPairs, inner - k) + 1) / 2; }
  void pack(const Bf16Matmul& kernels, int64_t k, int64_t column, int64_t n, uint32_t* out) const {
    const int64_t pairs = pairs_from(k);
    for (int64_t p = 0; p < pairs; ++p) {
      const BFloat16* row = b + (k + 2 * p) * stride + column;
      kernels.pack_pairs(row, k + 2 * p + 1 < inner ? row + stride : nullptr, n, out + p * kPanel, pairs * kPanel);
    }
  }
  // Where the numbers from row k and column `column` are in `packed`.
  int64_t at(int64_t k, int64_t column) const { return k / 2 * panels_of(width) * kPanel + column * pairs_from(k); }
  Lines<uint32_t> packed(const Bf16Matmul& kernels) const {
    Lines<uint32_t> out(size_t((inner + 1) / 2 * panels_of(width) * kPanel));
    const int64_t steps = (inner + 2 * kPackedPairs - 1) / (2 * kPackedPairs);
    share_tasks(steps, [&](const auto& take) {
      for (int64_t step; (step = take()) >= 0;) {
        const int64_t k = step * 2 * kPackedPairs;
        pack(kernels, k, 0, width, out.data() + at(k, 0));
      }
    });
    return out;
  }
};

// The sums [rows, width]: in float32; in two halves, `high` and `low`, the upper and lower 16 bits of float32; or in
// bfloat16, `high` alone, which is rounded once.
struct Sums {
  float* whole;
  BFloat16* high;
  uint16_t* low;
  int64_t width;

  void load(const Bf16Matmul& kernels, int64_t row, int64_t column, int64_t n, float* to) const {
    const int64_t at = row * width + column;
    if (whole) {
      std::copy_n(whole + at, n, to);
    } else if (low) {
      kernels.join_row(high + at, low + at, n, to);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = to_float(high[at + i]);
    }
  }
  // last: `high` becomes the sums times factor, rounded.
  void store(const Bf16Matmul& kernels, const float* from, int64_t row, int64_t column, int64_t n, bool last,
             float factor) const {
    const int64_t at = row * width + column;
    if (whole) {
      std::copy_n(from, n, whole + at);
    } else if (last) {
      kernels.round_row(from, n, factor, high + at);
    } else {
      kernels.split_row(from, n, high + at, low + at);
    }
  }
};

// A product by tiles is cut into tasks of rows and columns of its sums. The sums of a task, 1.2 MB at most, and the
// tiles of a and b of kStep numbers of the inner dimension stay in the L2 cache. dX of 1024 x 49,152 x 576 takes 36 ms
// in tasks of up to 512 rows and 41 in tasks of 256, which bring b into tiles twice as often (least times, two cores).
// With b shared, 256 rows leave room for it.
constexpr int64_t kMostColumns = 576, kMostRows = 512, kMostRowsOfShared = 256;

struct Split {
  int64_t rows, columns;  // of a task
  int64_t blocks, parts;  // tasks along them
};

Split split_of(int64_t rows, int64_t columns, int64_t most_rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto part = [](int64_t n, int64_t count) {
    return ((n + count - 1) / count + kPairOfTiles - 1) / kPairOfTiles * kPairOfTiles;
  };
  int64_t blocks = std::max<int64_t>(1, (rows + most_rows - 1) / most_rows);
  int64_t parts = std::max<int64_t>(1, (columns + kMostColumns - 1) / kMostColumns);
  // As many tasks as threads, or a multiple of that: the longer side is cut.
  const auto idle = [&] { return blocks * parts < 4 * threads && blocks * parts % threads; };
  while (idle() && std::max(part(rows, blocks), part(columns, parts)) > kPairOfTiles) {
    ++(part(rows, blocks) >= part(columns, parts) ? blocks : parts);
  }
  const Split split{part(rows, blocks), part(columns, parts)};
  return {split.rows, split.columns, (rows + split.rows - 1) / split.rows,
          (columns + split.columns - 1) / split.columns};
}

void add_product_by_tiles(const Bf16Matmul& kernels, const Left& a, const Right& b, const Sums& sums, int64_t rows,
                          bool shared, bool first, bool last, float factor) {
  const int64_t inner = b.inner, width = b.width;
  const Split split = split_of(rows, width, shared ? kMostRowsOfShared : kMostRows);
  const auto pack_b = [&](int64_t k, int64_t column, int64_t n, uint32_t* out) {
    const BFloat16* lines[kStep];
    const int64_t some = std::min(kStep, inner - k);
    for (int64_t i = 0; i < some; ++i) lines[i] = b.b + (k + i) * b.stride;
    kernels.tiles_of_b(lines, some, column, n, out);
  };
  // All of b: kStep rows of one task's columns after another.
  const int64_t steps = (inner + kStep - 1) / kStep, packed = split.columns * kStep / 2;
  Lines<uint32_t> all(shared ? size_t(steps * split.parts * packed) : 0);
  if (shared) {
    share_tasks(steps * split.parts, [&](const auto& take) {
      for (int64_t i; (i = take()) >= 0;) {
        const int64_t column = i % split.parts * split.columns;
        pack_b(i / split.parts * kStep, column, std::min(split.columns, width - column), all.data() + i * packed);
      }
    });
  }
  share_tasks(split.blocks * split.parts, [&](const auto& take) {
    Lines<uint32_t> left(size_t(split.rows * kStep / 2)), own_b(shared ? 0 : size_t(packed));
    Lines<float> own(size_t(split.rows * split.columns)), line(size_t(split.columns), 0.0f);
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t part = task % split.parts, column = part * split.columns,
                    n = std::min(split.columns, width - column);
      const int64_t row = task / split.parts * split.rows, count = std::min(split.rows, rows - row);
      const int64_t row_tiles = tiles_of(count);
      TileSums tiles{own.data(), row_tiles};
      if (first) {
        std::fill(own.begin(), own.end(), 0.0f);
      } else {
        for (int64_t t = 0; t < count; ++t) {
          sums.load(kernels, row + t, column, n, line.data());
          tiles.put(line.data(), t, n);
        }
      }
      for (int64_t k = 0; k < inner; k += kStep) {
        const int64_t some = std::min(kStep, inner - k);
        const uint32_t* right = shared ? all.data() + (k / kStep * split.parts + part) * packed : own_b.data();
        if (!shared) pack_b(k, column, n, own_b.data());
        if (a.transposed) {
          const BFloat16* lines[kStep];
          for (int64_t i = 0; i < some; ++i) lines[i] = a.a + (k + i) * a.stride;
          kernels.tiles_of_columns(lines, some, row, count, left.data());
        } else {
          kernels.tiles_of_rows(a.a + row * a.stride + k, a.stride, count, some, left.data());
        }
        kernels.add_tiles(left.data(), right, row_tiles, tiles_of(n), steps_of(some), own.data());
      }
      for (int64_t t = 0; t < count; ++t) {
        tiles.get(t, n, line.data());
        sums.store(kernels, line.data(), row + t, column, n, last, factor);
      }
    }
  });
}

}  // namespace

void add_product_(Tensor total, Tensor low, Tensor a, Tensor b, bool first, bool last, double factor) {
  const Bf16Matmul& kernels = bf16_matmul("add_product_");
  check_bf16_matrix("add_product_", "b", b);
  const bool halves = total.scalar_type() == ScalarType::BFloat16;
  if (!halves) check_dtype("total", total, ScalarType::Float);
  check_dtype("a", a, ScalarType::BFloat16);
  check(a.dim() == 2 && (a.stride(0) == 1 || a.stride(1) == 1), "add_product_: a must be a matrix of unit stride over ",
        "its columns or rows, got shape ", shape_of(a), "; call .contiguous() first");
  const int64_t rows = a.size(0), inner = a.size(1), width = b.size(1);
  check_matrix("b", b, inner, width);
  check_matrix("total", total, rows, width);
  check(total.is_contiguous(), "add_product_: total must be contiguous");
  const bool split = halves && low.dim() == 2;  // else [0]
  check(!halves || split || last, "add_product_: total in bfloat16 without low must be the last sum");
  if (split) {
    check_dtype("low", low, ScalarType::Short);
    check_matrix("low", low, rows, width);
    check(low.is_contiguous(), "add_product_: low must be contiguous");
  }
  if (rows == 0 || width == 0) return;
  const bool transposed = a.stride(1) != 1;
  const Left left{data_of<BFloat16>(a), a.stride(transposed ? 1 : 0), transposed};
  Sums sums{nullptr, nullptr, nullptr, width};
  if (halves) {
    sums.high = mutable_data_of<BFloat16>(total);
    if (split) sums.low = reinterpret_cast<uint16_t*>(mutable_data_of<int16_t>(low));
  } else {
    sums.whole = mutable_data_of<float>(total);
  }
  const Right right{data_of<BFloat16>(b), b.stride(0), inner, width};
  const bool shared = rows >= kSharedRows && inner * width <= kSharedNumbers;
  if (kernels.add_tiles) {
    add_product_by_tiles(kernels, left, right, sums, rows, shared, first, last, float(factor));
    return;
  }
  const SumTile tile = shared ? kSharedB : kOwnB;
  const int64_t blocks = (rows + tile.rows - 1) / tile.rows;
  const int64_t step = panels_per_task(width, blocks, tile.panels) * kPanel, parts = (width + step - 1) / step;
  Lines<uint32_t> all;
  if (shared) all = right.packed(kernels);
  share_tasks(blocks * parts, [&](const auto& take) {
    Lines<uint32_t> packed(shared ? 0 : size_t(kPackedPairs * step)), pairs_of_a;
    Lines<float> own(size_t(tile.rows * step));
    std::vector<float*> lines(tile.rows);
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t begin_row = task / parts * tile.rows, count = std::min(tile.rows, rows - begin_row);
      const int64_t column = task % parts * step, n = std::min(step, width - column), panels = panels_of(n);
      for (int64_t t = 0; t < count; ++t) {
        lines[t] = own.data() + t * panels * kPanel;
        if (first) {
          std::fill_n(lines[t], n, 0.0f);
        } else {
          sums.load(kernels, begin_row + t, column, n, lines[t]);
        }
      }
      for (int64_t k = 0; k < inner; k += 2 * kPackedPairs) {
        if (!shared) right.pack(kernels, k, column, n, packed.data());
        const uint32_t* operand = shared ? all.data() + right.at(k, column) : packed.data();
        left.add(kernels, begin_row, count, k, std::min(2 * kPackedPairs, inner - k), operand, panels, lines.data(),
                 pairs_of_a);
      }
      for (int64_t t = 0; t < count; ++t) sums.store(kernels, lines[t], begin_row + t, column, n, last, float(factor));
    }
  });
}

}  // namespace cpo
