// logits_, the CPU's own x W^T + bias - lacks in bfloat16: summed in float32 and rounded once.
//
// oneDNN computes the same with a matrix to add (torch.addmm), which it reads. Here a row's constant is where the sums
// begin. The sums of 32 columns and kPanel rows are computed with the rows in the lanes, since that leaves W as it is,
// and transposed when they are rounded; whole cache lines go past the caches.
#include "matmul.h"

#ifdef CPO_X86
#include <cpuid.h>
#endif

namespace cpo {
namespace {

constexpr int64_t kTaskColumns = 256;

// With AMX, which these kernels do not use, oneDNN computes all matmuls.
bool has_amx() {
#ifdef CPO_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
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
  check(found.add, op, ": the CPU's own matmuls need a processor with AVX512_BF16, and CPO_KERNELS_CPU_ISA=avx512");
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

}  // namespace cpo
