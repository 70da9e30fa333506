// logits_: x W^T + bias - lacks in bfloat16, summed in float32 and rounded once. linear_token_logps_fwd: log-probs of
// logits that are not stored, nor rounded.
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
constexpr double kLn2 = 0.6931471805599453;

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
    check(width % 2 == 0, op, ": the hidden size must be even, got ", width);
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

  // The logit of row t in a column, without scale.
  double logit(int64_t t, int64_t column) const {
    const BFloat16 *a = x + t * width, *b = weight + column * weight_stride;
    double sum = bias.empty() ? 0.0 : bias[column];
    for (int64_t h = 0; h < width; ++h) sum += double(to_float(a[h])) * to_float(b[h]);
    return sum;
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
                                                  int64_t ignore_index, double scale, int64_t vocab_size) {
  const char* op = "linear_token_logps_fwd";
  const Problem p(op, x, weight, bias);
  check(p.kernels.scan_logits, op, " needs a processor with AMX, and CPO_KERNELS_CPU_ISA unset or amx");
  check(scale > 0 && std::isfinite(scale), op, ": scale must be a positive number, got ", scale);
  check(vocab_size >= 1 && vocab_size <= p.columns, op, ": vocab_size must be in [1, ", p.columns,
        "] (the rows of weight), got ", vocab_size);
  check_dtype("labels", labels, ScalarType::Long);
  check_vector("labels", labels, p.rows);
  labels = dense(labels);
  const int64_t* ids = data_of<int64_t>(labels);
  check_labels(op, ids, p.rows, ignore_index, vocab_size);
  const int64_t tasks = p.tasks(vocab_size);
  const float c = float(scale * kLog2E);
  std::vector<float> tops(size_t(tasks * p.padded)), shifts(tops.size()), sums(tops.size());
  share_tasks(tasks, [&](const auto& take) {
    const WithoutSubnormals flushed;
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t at = task * p.padded;
      p.kernels.scan_logits(p.blocks(task, vocab_size), c, tops.data() + at, shifts.data() + at, sums.data() + at);
    }
  });
  Tensor logp = new_vector(x, p.rows, ScalarType::Float), lse = new_vector(x, p.rows, ScalarType::Float);
  float *own_logp = mutable_data_of<float>(logp), *own_lse = mutable_data_of<float>(lse);
  parallel_rows(p.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      own_logp[t] = own_lse[t] = 0;
      if (ids[t] == ignore_index) continue;
      float top = -INFINITY, shift = 0;
      for (int64_t i = t; i < tasks * p.padded; i += p.padded) {
        if (tops[i] > top) top = tops[i], shift = shifts[i];
      }
      double sum = 0;
      for (int64_t i = t; i < tasks * p.padded; i += p.padded) {
        if (sums[i] != 0) sum += sums[i] * std::exp2(double(shifts[i]) - shift);  // one of -inf alone has no shift
      }
      // Relative to the largest term. A sum of nothing but -inf is 0.
      const double log_sum = std::log(sum) - (top == -INFINITY ? 0.0 : kLn2 * (double(c) * top - shift));
      own_lse[t] = float(scale * top + log_sum);
      const double logp_t = scale * (p.logit(t, ids[t]) - top) - log_sum;
      own_logp[t] = float(logp_t > 0 ? 0.0 : logp_t);  // its label's logit is more exact than that in the sum
    }
  });
  return {logp, lse};
}

}  // namespace cpo
