// token_logps_fwd, token_logps_bwd_, token_logps_fused_ on the CPU: checks, choice of instruction set, threads, and the
// per-row arithmetic (in float64). The sweeps over columns are in token_logps_rows.h.
#include "token_logps.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "matmul.h"

#if defined(CPO_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cpo {
namespace {
constexpr double kLn2 = 0.6931471805599453;

// The processor has AMX_BF16, and the operating system gives this process tile registers.
bool has_amx() {
#if defined(CPO_X86) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const IsaKernels* choose_kernels() {
  const char* wanted = std::getenv("CPO_KERNELS_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  if (name == "portable") return kernels_portable();
#ifdef CPO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "amx" || name.empty()) {
    const bool amx = bf16 && has_amx();
    if (amx && kernels_amx()) return kernels_amx();
    check(name.empty(), "CPO_KERNELS_CPU_ISA=amx, but this build or processor has no AMX_BF16, or the system no tiles");
    if (amx) return kernels_avx512();  // without own matmuls, as those of oneDNN have AMX
  }
  if (name == "avx512" || name.empty()) {
    if (avx512) return bf16 ? kernels_avx512bf16() : kernels_avx512();
    check(name.empty(), "CPO_KERNELS_CPU_ISA=avx512, but this processor has no AVX-512 (F, BW, DQ, VL)");
  }
  if (name == "avx2" || name.empty()) {
    if (avx2) return kernels_avx2();
    check(name.empty(), "CPO_KERNELS_CPU_ISA=avx2, but this processor has no AVX2 with FMA and F16C");
  }
#endif
  check(name.empty(),
        "CPO_KERNELS_CPU_ISA must be portable, avx2, avx512 or amx (this build and processor permitting), got '", name,
        "'");
  return kernels_portable();
}

// Adds the sums of b to those of a.
void combine(const Rows& rows, Partial& a, const Partial& b) {
  Partial low = a, high = b;
  if (a.max_y > b.max_y) std::swap(low, high);
  // If all columns are -inf, their sums are 0 (or NaN, if one column was NaN) whatever the shift; c times the most
  // negative number is a shift of -inf.
  const double step = std::isinf(low.max_y) || low.shift == high.shift ? 0.0 : low.shift - high.shift;
  lower(low, step, rows.type == kFloat64 ? std::exp(step) : std::exp2(step));
  a.shift = high.shift;
  a.max_y = high.max_y;
  a.top = high.top;
  a.sum_t = high.sum_t + low.sum_t;
  a.sum = high.sum + low.sum;
  a.sum_sq = high.sum_sq + low.sum_sq;
  a.sum_y = high.sum_y + low.sum_y;
}

struct RowResult {
  double logp, lse;
  double shift, inverse_sum;  // softmax = E^(c y - shift) * inverse_sum
};

// Replaces the label's stored term in the sums by the exact one. Sums of positive terms are at least that term.
void replace_label(const Rows& rows, Partial& sums, double stored, double y_label) {
  const auto term = [&](double y) {
    const double t = rows.map.c * y - sums.shift;
    return std::pair(std::max(t, -1000.0), rows.type == kFloat64 ? std::exp(t) : std::exp2(t));
  };
  const auto [old_t, old] = term(stored);
  const auto [t, e] = term(y_label);
  sums.sum = std::max(sums.sum - old + e, e);
  sums.sum_t += t * e - old_t * old;
  sums.sum_sq = std::max(sums.sum_sq - old * old + e * e, e * e);
  if (std::isfinite(stored)) sums.sum_y += y_label - stored;
}

// All results of a row, from its sums. Sums are taken relative to their largest term as rounded: if it is the only
// term, the logarithm is exactly 0.
// stored: y of its label as stored.
RowResult finish(const Rows& rows, int64_t i, Partial sums, double stored, double* extra) {
  const bool all_masked = sums.max_y == -INFINITY;
  const double y_label = all_masked ? stored : label_y(rows, i);
  if (rows.anchors && !all_masked) replace_label(rows, sums, stored, y_label);
  // If all logits of a row exceed about 1e9, rounding the shift may already take E^t out of the range of floats.
  const bool lost = !all_masked && !(sums.top > FLT_MIN && sums.sum < INFINITY && sums.top < INFINITY);
  const double log_sum = lost ? NAN : std::log(all_masked ? sums.sum : sums.sum / sums.top);
  RowResult r;
  r.logp = rows.map.nat * (y_label - sums.max_y) - log_sum;
  r.lse = rows.map.nat * sums.max_y + rows.z_lacks(i) + log_sum;
  r.shift = sums.shift;
  r.inverse_sum = lost ? NAN : 1.0 / sums.sum;
  if (extra) {
    const double unit = rows.type == kFloat64 ? 1.0 : kLn2;
    const double top_t = rows.map.c * sums.max_y - sums.shift;
    extra[0] = log_sum - unit * (sums.sum_t / sums.sum - top_t);             // entropy
    extra[1] = std::log(sums.sum_sq / (sums.top * sums.top)) - 2 * log_sum;  // log sum p^2
    extra[2] = rows.map.nat * sums.sum_y / rows.columns + rows.z_lacks(i);   // mean z
    extra[3] = stored == sums.max_y && !std::isnan(sums.sum) ? 1.0 : 0.0;
  }
  return r;
}

// What the gradient of a row needs, computed before its logits are overwritten.
struct RowGradient {
  double shift, factor, per_t;  // column v: E^t * (factor + per_t * t) (* 1 - tanh^2), t = c y - shift
  double at_label;              // the label's column, 1 - softmax without cancellation
};

RowGradient plan_gradient(const Rows& rows, int64_t i, double shift, double inverse_sum, double logp, double grad) {
  return {shift, -grad * rows.scale * inverse_sum, 0.0, -std::expm1(logp) * grad * label_slope(rows, i)};
}

void clear(const Rows& rows, int64_t i, int64_t from) {
  std::memset(rows.row(i) + from * rows.element_size, 0, size_t((rows.width - from) * rows.element_size));
}

void write_gradient(const Rows& rows, int64_t i, const RowGradient& g, int64_t begin, int64_t end) {
  char* row = rows.row(i);
  char* next = i + 1 < rows.count ? row + rows.stride : row;  // to prefetch
  const int64_t offset = begin * rows.element_size;
  rows.kernels->gradient(row + offset, end - begin, rows.map_of(i), g.shift, g.factor, g.per_t, next + offset);
  const int64_t label = rows.labels[i];
  if (label >= begin && label < end) { store_element(rows.type, row + label * rows.element_size, g.at_label); }
  if (end == rows.columns) clear(rows, i, rows.columns);
}

// plan(i) -> RowGradient of row i, called once, before the row is overwritten.
template <typename Plan>
void write_rows(const Rows& rows, const Plan& plan) {
  if (!rows.split_columns()) {
    parallel_rows(rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        rows.ignored(i) ? clear(rows, i, 0) : write_gradient(rows, i, plan(i), 0, rows.columns);
      }
    });
    return;
  }
  std::vector<RowGradient> plans(rows.count);
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!rows.ignored(i)) plans[i] = plan(i);
  }
  parallel_rows(rows.count * rows.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / rows.pieces(), first = task % rows.pieces() * kPiece;
      const int64_t last = std::min(first + kPiece, rows.columns);
      if (!rows.ignored(i)) {
        write_gradient(rows, i, plans[i], first, last);
      } else if (first == 0) {
        clear(rows, i, 0);
      }
    }
  });
}

// The sums of every row. Threads share pieces of columns, whose sums are added in column order.
std::vector<Partial> scan_pieces(const Rows& rows, bool extras) {
  const int64_t pieces = rows.pieces();
  std::vector<Partial> partials(rows.count * pieces);
  parallel_rows(rows.count * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / pieces, first = task % pieces * kPiece;
      if (rows.ignored(i)) continue;
      partials[task] = rows.kernels->scan(rows.row(i) + first * rows.element_size,
                                          std::min(kPiece, rows.columns - first), rows.map_of(i), extras);
    }
  });
  std::vector<Partial> totals(rows.count);
  for (int64_t i = 0; i < rows.count; ++i) {
    totals[i] = partials[i * pieces];
    for (int64_t k = 1; k < pieces; ++k) combine(rows, totals[i], partials[i * pieces + k]);
  }
  return totals;
}

template <typename Acc>
void store_row(const Rows& rows, int64_t i, const RowResult* r, const double* extra, Acc* logp, Acc* lse,
               Acc* extra_out) {
  logp[i] = r ? Acc(r->logp) : Acc(0);
  lse[i] = r ? Acc(r->lse) : Acc(0);
  if (!extra_out) return;
  for (int k = 0; k < 4; ++k) extra_out[k * rows.count + i] = r ? Acc(extra[k]) : Acc(0);
}

// fwd, and with kOverwrite also the gradient of the sum of the log-probs in place of the logits.
template <typename Acc, bool kOverwrite>
void run(const Rows& rows, bool extras, Acc* logp, Acc* lse, Acc* extra_out) {
  const bool split = rows.split_columns();
  const std::vector<Partial> totals = split ? scan_pieces(rows, extras) : std::vector<Partial>();
  const auto forward = [&](int64_t i) {
    const Partial sums = split ? totals[i] : rows.kernels->scan(rows.row(i), rows.columns, rows.map_of(i), extras);
    double extra[4];
    const RowResult r = finish(rows, i, sums, stored_label_y(rows, i), extras ? extra : nullptr);
    store_row(rows, i, &r, extra, logp, lse, extra_out);
    return r;
  };
  for (int64_t i = 0; i < rows.count; ++i) {
    if (rows.ignored(i)) store_row<Acc>(rows, i, nullptr, nullptr, logp, lse, extra_out);
  }
  if (kOverwrite) {
    write_rows(rows, [&](int64_t i) {
      const RowResult r = forward(i);
      return plan_gradient(rows, i, r.shift, r.inverse_sum, r.logp, 1.0);
    });
  } else {
    parallel_rows(rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!rows.ignored(i)) forward(i);
      }
    });
  }
}

template <bool kOverwrite>
std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& logits, const Tensor& labels,
                                           int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                                           bool extras, const Optional& anchors) {
  const Rows rows = describe(op, logits, labels, ignore_index, scale, softcap, vocab_size, anchors);
  check_labels(op, rows.labels, rows.count, ignore_index, vocab_size);
  if (kOverwrite) check_writable(op, logits);
  Tensor logp = new_vector(logits, rows.count, rows.acc());
  Tensor lse = new_vector(logits, rows.count, rows.acc());
  Tensor extra =
      extras ? torch::stable::new_empty(logits, {4, rows.count}, rows.acc()) : new_vector(logits, 0, rows.acc());
  if (rows.type == kFloat64) {
    run<double, kOverwrite>(rows, extras, mutable_data_of<double>(logp), mutable_data_of<double>(lse),
                            extras ? mutable_data_of<double>(extra) : nullptr);
  } else {
    run<float, kOverwrite>(rows, extras, mutable_data_of<float>(logp), mutable_data_of<float>(lse),
                           extras ? mutable_data_of<float>(extra) : nullptr);
  }
  return {logp, lse, extra};
}

// entropies [2, count] or null.
template <typename Acc>
void backward(const Rows& rows, const Acc* lse, const Acc* grad, const Acc* entropies) {
  write_rows(rows, [&](int64_t i) {
    const double own_lse = double(lse[i]) - rows.z_lacks(i);
    const auto [shift, rest] = shift_of(rows, own_lse);
    const double logp = rows.map.nat * label_y(rows, i) - own_lse;
    RowGradient g = plan_gradient(rows, i, shift, rest, logp, grad[i]);
    if (!entropies || entropies[i] == 0) return g;
    // -p (log p + H) each, where log p = unit * t + log(rest)
    const double of_entropy = entropies[i], entropy = entropies[rows.count + i];
    const double unit = rows.type == kFloat64 ? 1.0 : kLn2;
    g.factor -= of_entropy * rows.scale * rest * (entropy + std::log(rest));
    g.per_t = -of_entropy * rows.scale * rest * unit;
    if (logp > -INFINITY) g.at_label -= of_entropy * std::exp(logp) * (logp + entropy) * label_slope(rows, i);
    return g;
  });
}

}  // namespace

const IsaKernels& isa_kernels() {
  static const IsaKernels* chosen = choose_kernels();
  return *chosen;
}

std::tuple<Tensor, Tensor, Tensor> token_logps_fwd(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                   double softcap, int64_t vocab_size, bool extras, Optional anchors) {
  return forward<false>("token_logps_fwd", logits, labels, ignore_index, scale, softcap, vocab_size, extras, anchors);
}

std::tuple<Tensor, Tensor> logps_of_partials(const Tensor& labels, int64_t ignore_index, double scale,
                                             int64_t vocab_size, const Tensor& anchors, int64_t parts,
                                             const std::function<Partial(int64_t, int64_t)>& part,
                                             const std::vector<float>& at_label) {
  Rows rows = problem(kBFloat16, labels, ignore_index, scale, 0.0, vocab_size);
  rows.anchors = data_of<float>(anchors);
  Tensor logp = new_vector(anchors, rows.count, rows.acc()), lse = new_vector(anchors, rows.count, rows.acc());
  float *own_logp = mutable_data_of<float>(logp), *own_lse = mutable_data_of<float>(lse);
  parallel_rows(rows.count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (rows.ignored(i)) {
        store_row<float>(rows, i, nullptr, nullptr, own_logp, own_lse, nullptr);
        continue;
      }
      Partial total = part(0, i);
      for (int64_t k = 1; k < parts; ++k) combine(rows, total, part(k, i));
      const RowResult r = finish(rows, i, total, at_label[i], nullptr);
      store_row<float>(rows, i, &r, nullptr, own_logp, own_lse, nullptr);
    }
  });
  return {logp, lse};
}

std::tuple<Tensor, Tensor, Tensor> token_logps_fused_(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                      double softcap, int64_t vocab_size, bool extras,
                                                      Optional anchors) {
  return forward<true>("token_logps_fused_", logits, labels, ignore_index, scale, softcap, vocab_size, extras, anchors);
}

void token_logps_bwd_(Tensor logits, Tensor labels, Tensor lse, Tensor grad, int64_t ignore_index, double scale,
                      double softcap, int64_t vocab_size, Optional anchors, Optional entropies) {
  const Rows rows = describe("token_logps_bwd_", logits, labels, ignore_index, scale, softcap, vocab_size, anchors);
  check_labels("token_logps_bwd_", rows.labels, rows.count, ignore_index, vocab_size);
  check_writable("token_logps_bwd_", logits);
  check_row_values(lse, grad, rows.count, rows.acc());
  check_row_pairs("token_logps_bwd_", "entropies", entropies, rows.count, rows.acc());
  lse = dense(lse);
  grad = dense(grad);
  if (entropies) entropies = dense(*entropies);
  if (rows.type == kFloat64) {
    backward(rows, data_of<double>(lse), data_of<double>(grad), entropies ? data_of<double>(*entropies) : nullptr);
  } else {
    backward(rows, data_of<float>(lse), data_of<float>(grad), entropies ? data_of<float>(*entropies) : nullptr);
  }
}

}  // namespace cpo
