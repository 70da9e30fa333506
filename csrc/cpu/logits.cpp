// logits_: x W^T + bias - lacks in bfloat16, summed in float32 and rounded once.
//
// oneDNN computes the same with a matrix to add (torch.addmm), which it reads. Here a row's constant is added
// in registers: X W^T of 1024 x 576 x 49,152 with constants takes the time of oneDNN's product without them (AMX, two
// cores; with torch.addmm 1.2 times that). Without AMX the sums of 32 columns and kPanel rows have the rows in the
// lanes, since that leaves W as it is, and are transposed when they are rounded. Whole cache lines go past the caches.
#include "matmul.h"

namespace cpo {
namespace {

constexpr int64_t kTaskColumns = 512;

// The rows of x as Bf16Matmul::logits takes them.
Lines<uint32_t> pack_rows(const Bf16Matmul& kernels, const BFloat16* x, int64_t rows, int64_t width) {
  const int64_t pairs = (width / 2 + kTile - 1) / kTile * kTile;
  const int64_t panels = panels_of(rows), size = pairs * kPanel;
  Lines<uint32_t> packed(size_t(panels * size));
  share_tasks(panels, [&](const auto& take) {
    for (int64_t i; (i = take()) >= 0;) {
      kernels.pack_x(x + i * kPanel * width, std::min(kPanel, rows - i * kPanel), width, packed.data() + i * size);
    }
  });
  return packed;
}

}  // namespace

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
  const Lines<uint32_t> packed = pack_rows(kernels, data_of<BFloat16>(x), rows, width);
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
  share_tasks((columns + kTaskColumns - 1) / kTaskColumns, [&](const auto& take) {
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t low = task * kTaskColumns, high = std::min(columns, low + kTaskColumns);
      kernels.logits(w + low * w_stride, w_stride, high - low, packed.data(), width / 2, rows,
                     added.empty() ? nullptr : added.data() + low, minus.data(), z + low, stride);
    }
  });
}

}  // namespace cpo
