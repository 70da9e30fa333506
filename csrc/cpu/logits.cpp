// logits_: x W^T + bias - lacks in bfloat16, summed in float32 and rounded once. linear_token_logps_fwd: log-probs of
// the same logits, which are not stored.
//
// oneDNN computes the first with a matrix to add (torch.addmm), which it reads; here a row's constant is added in
// registers. With AMX a block of logits is rounded and stored, or scanned, while the next one is multiplied
// (matmul_amx.h). Scanning blocks that are stored as well took longer than to read them again: 8.0 ms for 246 rows of
// 576 x 49,152, in place of 5.6 and 1.2 (two cores). Without AMX the sums of 32 columns and kPanel rows have the rows
// in the lanes, since that leaves W as it is, and are transposed when they are rounded. Whole cache lines go past the
// caches.
#include "matmul.h"

namespace cpo {
namespace {

constexpr int64_t kTaskColumns = 512;

// A head and its rows, checked.
struct Problem {
  const Bf16Matmul& kernels;
  Tensor x_tensor;
  const BFloat16 *x, *weight;
  int64_t rows, width, weight_stride, columns, padded;
  std::vector<float> bias;
  Lines<uint32_t> packed;

  Problem(const char* op, const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in)
      : kernels(bf16_matmul(op)) {
    check_bf16_matrix(op, "x", x_in);
    check_bf16_matrix(op, "weight", weight_in);
    rows = x_in.size(0), width = x_in.size(1), columns = weight_in.size(0), weight_stride = weight_in.stride(0);
    check(width > 0 && width % 2 == 0, op, ": the hidden size must be even and positive, got ", width);
    check_matrix("weight", weight_in, columns, width);
    if (given(bias_in)) {
      check_dtype("bias", bias_in, ScalarType::BFloat16);
      check_vector("bias", bias_in, columns);
      const Tensor values = dense(bias_in);
      for (int64_t v = 0; v < columns; ++v) bias.push_back(to_float(data_of<BFloat16>(values)[v]));
    }
    x_tensor = dense(x_in);
    x = data_of<BFloat16>(x_tensor), weight = data_of<BFloat16>(weight_in);
    padded = panels_of(rows) * kPanel;
    const int64_t panels = panels_of(rows), size = (width / 2 + kTile - 1) / kTile * kTile * kPanel;
    packed.resize(size_t(panels * size));
    share_tasks(panels, [&](const auto& take) {
      for (int64_t i; (i = take()) >= 0;) {
        kernels.pack_x(x + i * kPanel * width, std::min(kPanel, rows - i * kPanel), width, packed.data() + i * size);
      }
    });
  }

  // Of the first `limit` columns.
  static int64_t tasks(int64_t limit) { return (limit + kTaskColumns - 1) / kTaskColumns; }
  HeadBlocks blocks(int64_t task, int64_t limit) const {
    const int64_t low = task * kTaskColumns, count = std::min(kTaskColumns, limit - low);
    const float* own_bias = bias.empty() ? nullptr : bias.data() + low;
    return {weight + low * weight_stride, weight_stride, count, packed.data(), width / 2, rows, own_bias};
  }
};

}  // namespace

void logits_(Tensor x, Tensor weight, Tensor bias, Tensor lacks, Tensor out) {
  const char* op = "logits_";
  const Problem p(op, x, weight, bias);
  check_bf16_matrix(op, "out", out);
  check_matrix("out", out, p.rows, p.columns);
  const int64_t stride = out.stride(0);
  check(p.rows <= 1 || stride >= p.columns, op, ": the rows of out must not overlap, got row stride ", stride, " for ",
        p.columns, " columns");
  std::vector<float> minus(size_t(p.padded));
  if (given(lacks)) {
    check_dtype("lacks", lacks, ScalarType::Float);
    check_vector("lacks", lacks, p.rows);
    lacks = dense(lacks);
    for (int64_t t = 0; t < p.rows; ++t) minus[t] = -data_of<float>(lacks)[t];
  }
  BFloat16* z = mutable_data_of<BFloat16>(out);
  share_tasks(p.tasks(p.columns), [&](const auto& take) {
    for (int64_t task; (task = take()) >= 0;) {
      p.kernels.logits(p.blocks(task, p.columns), minus.data(), z + task * kTaskColumns, stride);
    }
  });
}

std::tuple<Tensor, Tensor> linear_token_logps_fwd(Tensor x, Tensor weight, Tensor bias, Tensor labels,
                                                  int64_t ignore_index, double scale, int64_t vocab_size,
                                                  Tensor anchors) {
  const char* op = "linear_token_logps_fwd";
  check(bf16_matmul(op).scan_logits, op, " needs a processor with AMX, and CPO_KERNELS_CPU_ISA unset or amx");
  const Problem p(op, x, weight, bias);
  check(scale > 0 && std::isfinite(scale), op, ": scale must be a positive number, got ", scale);
  check(vocab_size >= 1 && vocab_size <= p.columns, op, ": vocab_size must be in [1, ", p.columns,
        "] (the rows of weight), got ", vocab_size);
  check_dtype("labels", labels, ScalarType::Long);
  check_vector("labels", labels, p.rows);
  check_row_pairs(op, "anchors", anchors, p.rows, ScalarType::Float);
  labels = dense(labels), anchors = dense(anchors);
  const int64_t* ids = data_of<int64_t>(labels);
  check_labels(op, ids, p.rows, ignore_index, vocab_size);
  const int64_t tasks = p.tasks(vocab_size);
  std::vector<float> minus(size_t(p.padded)), at_label(size_t(p.padded));
  std::vector<int32_t> columns(size_t(p.padded), -1);
  for (int64_t t = 0; t < p.rows; ++t) {
    minus[t] = -data_of<float>(anchors)[t];
    columns[t] = ids[t] == ignore_index ? -1 : int32_t(ids[t]);
  }
  std::vector<float> found(size_t(tasks * 4 * p.padded));
  const auto of_task = [&](int64_t task) { return found.data() + task * 4 * p.padded; };
  share_tasks(tasks, [&](const auto& take) {
    const WithoutSubnormals flushed;
    for (int64_t task; (task = take()) >= 0;) {
      float *tops = of_task(task), *shifts = tops + p.padded, *powers = shifts + p.padded, *sums = powers + p.padded;
      p.kernels.scan_logits(p.blocks(task, vocab_size),
                            {float(scale * kLog2E), minus.data(), columns.data(), task * kTaskColumns, tops, shifts,
                             powers, sums, at_label.data()});
    }
  });
  const auto part = [&](int64_t task, int64_t t) {
    const float* at = of_task(task) + t;
    return Partial{at[p.padded], at[0], at[2 * p.padded], at[3 * p.padded], 0, 0, 0};
  };
  return logps_of_partials(labels, ignore_index, scale, vocab_size, anchors, tasks, part, at_label);
}

}  // namespace cpo
