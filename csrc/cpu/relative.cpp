// relative_anchors: the constants of rows that are subtracted from their logits, and the logits of their labels, by the
// CPU's own matmuls. Formulas: cpo_kernels/head/relative.py.
#include "matmul.h"

namespace cpo {
namespace {

// sum_i x[i] y[i] in float32. Sixteen sums at a time, which the compiler may keep in vectors.
float dot(const BFloat16* x, const BFloat16* y, int64_t n) {
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t k = 0; k < kSums; ++k) sums[k] += to_float(x[i + k]) * to_float(y[i + k]);
  }
  double total = 0.0;
  for (const float sum : sums) total += sum;
  for (; i < n; ++i) total += to_float(x[i]) * to_float(y[i]);
  return float(total);
}

// The mean logit under the softmax of a row, mapped back to what the head computes; 0 if it is not finite, as in a row
// whose columns are all masked. Representable in bfloat16, with half of its range left for differences.
float constant_of(double lse, double entropy, double scale, double softcap) {
  double mean = lse - entropy;
  if (softcap > 0) mean = softcap * std::atanh(std::clamp(mean / softcap, -0.999, 0.999));
  mean /= scale;
  if (!std::isfinite(mean)) return 0.0f;
  const double most = to_float(BFloat16{0x7eff});  // half of the largest number
  BFloat16 rounded;
  from_float(rounded, float(std::clamp(mean, -most, most)));
  return to_float(rounded);
}

}  // namespace

Tensor relative_anchors(Tensor x, Tensor weight, Tensor labels, Tensor few, double scale, double softcap, Tensor room) {
  const char* op = "relative_anchors";
  check_bf16_matrix(op, "x", x);
  check_bf16_matrix(op, "weight", weight);
  check_bf16_matrix(op, "few", few);
  check_bf16_matrix(op, "room", room);
  const int64_t n = x.size(0), width = x.size(1), count = few.size(0), step = room.size(0);
  check_matrix("weight", weight, weight.size(0), width);
  check_matrix("few", few, count, width);
  check_matrix("room", room, step, count);
  check(count >= 1 && (n == 0 || step >= 1), op, ": few and room must have rows, got ", count, " and ", step);
  check_dtype("labels", labels, ScalarType::Long);
  check_vector("labels", labels, n);
  labels = dense(labels);
  const int64_t* ids = data_of<int64_t>(labels);
  for (int64_t t = 0; t < n; ++t) {
    check(ids[t] >= 0 && ids[t] < weight.size(0), op, ": labels must lie in [0, ", weight.size(0), "), got ", ids[t],
          " at row ", t);
  }
  Tensor anchors = torch::stable::new_empty(x, {2, n}, ScalarType::Float);
  float *constants = mutable_data_of<float>(anchors), *at_label = constants + n;
  const Tensor none = new_vector(x, 0, ScalarType::BFloat16), no_lacks = new_vector(x, 0, ScalarType::Float);
  for (int64_t low = 0; low < n; low += step) {
    const int64_t rows = std::min(step, n - low);
    Tensor part = x, u = room;
    if (rows < n) {  // a copy: parts of tensors are not in the stable ABI of torch 2.10
      part = torch::stable::new_empty(x, {rows, width});
      for (int64_t t = 0; t < rows; ++t) {
        std::copy_n(data_of<BFloat16>(x) + (low + t) * x.stride(0), width, mutable_data_of<BFloat16>(part) + t * width);
      }
    }
    if (rows < step) u = torch::stable::new_empty(x, {rows, count});
    logits_(part, few, none, no_lacks, u);
    Tensor any_label = new_vector(x, rows, ScalarType::Long);
    std::fill_n(mutable_data_of<int64_t>(any_label), rows, 0);
    const auto [logp, lse, extra] = token_logps_fwd(u, any_label, -1, scale, softcap, count, true, std::nullopt);
    const float *total = data_of<float>(lse), *entropy = data_of<float>(extra);
    for (int64_t t = 0; t < rows; ++t) constants[low + t] = constant_of(total[t], entropy[t], scale, softcap);
  }
  const BFloat16 *rows = data_of<BFloat16>(x), *w = data_of<BFloat16>(weight);
  const int64_t x_stride = x.stride(0), w_stride = weight.stride(0);
  parallel_rows(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) at_label[t] = dot(rows + t * x_stride, w + ids[t] * w_stride, width);
  });
  return anchors;
}

}  // namespace cpo
