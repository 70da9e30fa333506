// The CPU's own matmuls in bfloat16 besides those with live columns: logits_, x W^T + bias - lacks, summed in float32
// and rounded once; and add_product_, which adds a b to float32.
//
// logits_: oneDNN computes the same with a matrix to add (torch.addmm), which it reads. Here a row's constant is where
// the sums begin. The sums of 32 columns and kPanel rows are computed with the rows in the lanes, since that leaves W
// as it is, and transposed when they are rounded; whole cache lines go past the caches.
#include "matmul.h"

#ifdef CPO_X86
#include <cpuid.h>
#endif

namespace cpo {
namespace {

constexpr int64_t kTaskColumns = 256;
constexpr int64_t kSumRows = 256, kSumPanels = 5;  // of the sums per task, at most: 330 kB

// With AMX, which these kernels do not use, oneDNN computes all matmuls. The processor has AMX_BF16, and the operating
// system saves its tiles.
bool has_amx() {
#ifdef CPO_X86
  unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1)) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
#else
  return false;
#endif
}

// The pairs of neighbours in the rows of x, as the second operand of Bf16Matmul::logits.
std::vector<uint32_t> pack_columns(const BFloat16* x, int64_t rows, int64_t width) {
  const int64_t pairs = width / 2, panels = panels_of(rows);
  std::vector<uint32_t> packed(size_t(panels * pairs * kPanel));
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * kPanel; t < std::min(rows, end * kPanel); ++t) {
      uint32_t* to = packed.data() + t / kPanel * pairs * kPanel + t % kPanel;
      const BFloat16* row = x + t * width;
      for (int64_t p = 0; p < pairs; ++p) to[p * kPanel] = row[2 * p].bits | uint32_t(row[2 * p + 1].bits) << 16;
    }
  });
  return packed;
}

}  // namespace

bool has_bf16_matmuls() {
  static const bool found = isa_kernels().matmul.add && !has_amx();
  return found;
}

const Bf16Matmul& bf16_matmul(const char* op) {
  const Bf16Matmul& found = isa_kernels().matmul;
  check(found.add, op,
        ": the CPU's own matmuls need a processor with AVX512_BF16, and CPO_KERNELS_CPU_ISA unset or avx512");
  return found;
}

void logits_(Tensor x, Tensor weight, Tensor bias, Tensor lacks, Tensor out) {
  const Bf16Matmul& kernels = bf16_matmul("logits_");
  check_bf16_matrix("logits_", "x", x);
  check_bf16_matrix("logits_", "weight", weight);
  check_bf16_matrix("logits_", "out", out);
  const int64_t rows = x.size(0), width = x.size(1), columns = weight.size(0);
  check(width % 2 == 0, "logits_: the hidden size must be even, got ", width);
  check_matrix("weight", weight, columns, width);
  check_matrix("out", out, rows, columns);
  check(rows <= 1 || out.stride(0) >= columns, "logits_: the rows of out must not overlap, got row stride ",
        out.stride(0), " for ", columns, " columns");
  x = dense(x);
  const std::vector<uint32_t> packed = pack_columns(data_of<BFloat16>(x), rows, width);
  std::vector<float> minus(size_t(panels_of(rows) * kPanel));
  if (given(lacks)) {
    check_dtype("lacks", lacks, ScalarType::Float);
    check_vector("lacks", lacks, rows);
    lacks = dense(lacks);
    for (int64_t t = 0; t < rows; ++t) minus[t] = -data_of<float>(lacks)[t];
  }
  std::vector<float> added;
  if (given(bias)) {
    check_dtype("bias", bias, ScalarType::BFloat16);
    check_vector("bias", bias, columns);
    bias = dense(bias);
    for (int64_t v = 0; v < columns; ++v) added.push_back(to_float(data_of<BFloat16>(bias)[v]));
  }
  const BFloat16* w = data_of<BFloat16>(weight);
  BFloat16* z = mutable_data_of<BFloat16>(out);
  const int64_t w_stride = weight.stride(0), stride = out.stride(0);
  torch::stable::parallel_for(0, (columns + kTaskColumns - 1) / kTaskColumns, 1, [&](int64_t begin, int64_t end) {
    const int64_t low = begin * kTaskColumns, high = std::min(columns, end * kTaskColumns);
    kernels.logits(w + low * w_stride, w_stride, high - low, packed.data(), width / 2, rows,
                   added.empty() ? nullptr : added.data() + low, minus.data(), z + low, stride);
  });
}

void add_product_(Tensor total, Tensor a, Tensor b) {
  const Bf16Matmul& kernels = bf16_matmul("add_product_");
  check_bf16_matrix("add_product_", "a", a);
  check_bf16_matrix("add_product_", "b", b);
  check_dtype("total", total, ScalarType::Float);
  const int64_t rows = a.size(0), inner = a.size(1), width = b.size(1);
  check_matrix("b", b, inner, width);
  check_matrix("total", total, rows, width);
  check(total.is_contiguous(), "add_product_: total must be contiguous");
  const BFloat16 *left = data_of<BFloat16>(a), *right = data_of<BFloat16>(b);
  float* sums = mutable_data_of<float>(total);
  const int64_t a_stride = a.stride(0), b_stride = b.stride(0), blocks = (rows + kSumRows - 1) / kSumRows;
  const int64_t step = panels_per_task(width, blocks, kSumPanels) * kPanel, parts = (width + step - 1) / step;
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> packed(size_t(kPackedPairs * step)), last(kSumRows);
    std::vector<float> own(size_t(kSumRows * step));
    std::vector<float*> lines(kSumRows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t low = task / parts * kSumRows, count = std::min(kSumRows, rows - low);
      const int64_t first = task % parts * step, n = std::min(step, width - first), panels = panels_of(n);
      for (int64_t t = 0; t < count; ++t) {
        lines[t] = own.data() + t * panels * kPanel;
        std::copy_n(sums + (low + t) * width + first, n, lines[t]);
      }
      for (int64_t k = 0; k < inner; k += 2 * kPackedPairs) {
        const int64_t whole = std::min(2 * kPackedPairs, inner - k) / 2;
        for (int64_t p = 0; p < whole; ++p) {
          const BFloat16* row = right + (k + 2 * p) * b_stride + first;
          kernels.pack_pairs(row, row + b_stride, n, packed.data() + p * kPanel, whole * kPanel);
        }
        kernels.add(left + low * a_stride + k, 2 * a_stride, 4, count, packed.data(), whole, panels, lines.data());
      }
      if (inner % 2) {  // behind the last number of a row there may be none
        for (int64_t t = 0; t < count; ++t) last[t] = left[(low + t) * a_stride + inner - 1].bits;
        kernels.pack_pairs(right + (inner - 1) * b_stride + first, nullptr, n, packed.data(), kPanel);
        kernels.add(last.data(), 4, 4, count, packed.data(), 1, panels, lines.data());
      }
      for (int64_t t = 0; t < count; ++t) std::copy_n(lines[t], n, sums + (low + t) * width + first);
    }
  });
}

}  // namespace cpo
