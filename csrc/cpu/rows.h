// The rows of the token ops on the CPU, and their common arithmetic.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "../common.h"
#include "../token_logps_checks.h"
#include "token_logps.h"

#ifdef CPO_X86
#include <xmmintrin.h>
#endif

namespace cpo {

// While it lives, results of this thread that would be subnormal are 0 (on x86). A row whose logits are 87 nats apart
// has exponentials among them, at some 100 cycles each: 1024 x 1586 bfloat16 logits of deviation 24 took 9.4 ms, those
// of deviation 3 0.4 ms (two cores). Subnormal operands keep their value: a conversion from float16 begins with one.
class WithoutSubnormals {
 public:
#ifdef CPO_X86
  WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000); }
  ~WithoutSubnormals() { _mm_setcsr(before_); }
  WithoutSubnormals(const WithoutSubnormals&) = delete;

 private:
  unsigned before_;
#endif
};

// f(take) on the threads of torch: take() gives the next of `count` tasks, then -1. Threads need not be equally fast:
// on a virtual machine with two cores, one did a third of the work of the other while it shared its core with a
// neighbour.
template <typename F>
void share_tasks(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
    return task < count ? task : -1;
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { f(take); });
}

// f(begin, end) over parts of [0, count), at least `grain` long but for the last, which threads take as they get there.
template <typename F>
void parallel_rows(int64_t count, int64_t grain, const F& f) {
  constexpr int64_t kTurns = 8;  // parts per thread
  const int64_t turns = kTurns * torch::stable::get_num_threads();
  const int64_t step = std::max(grain, (count + turns - 1) / turns);
  share_tasks((count + step - 1) / step, [&](const auto& take) {
    [[maybe_unused]] const WithoutSubnormals flushed;
    for (int64_t part; (part = take()) >= 0;) f(part * step, std::min(count, (part + 1) * step));
  });
}

const IsaKernels& isa_kernels();  // of the chosen instruction set

namespace {
#include "scalar16.h"

constexpr double kLog2E = 1.4426950408889634;
// Rows are split by columns if threads would otherwise be idle: pieces of 16384 columns take about 5 us.
constexpr int64_t kPiece = 16384;

inline double load_element(ElementType type, const void* p) {
  switch (type) {
    case kFloat32: return *static_cast<const float*>(p);
    case kFloat64: return *static_cast<const double*>(p);
    case kBFloat16: return to_float(*static_cast<const BFloat16*>(p));
    default: return to_float(*static_cast<const Half*>(p));
  }
}

inline void store_element(ElementType type, void* p, double x) {
  switch (type) {
    case kFloat32: *static_cast<float*>(p) = float(x); break;
    case kFloat64: *static_cast<double*>(p) = x; break;
    case kBFloat16: from_float(*static_cast<BFloat16*>(p), float(x)); break;
    default: from_float(*static_cast<Half*>(p), float(x));
  }
}

// The columns of sets, which offsets delimit.
inline void check_columns(const char* op, const int64_t* columns, const int64_t* offsets, int64_t sets, int64_t count,
                          int64_t width) {
  check(offsets[0] == 0 && offsets[sets] == count, op, ": offsets must run from 0 to the number of columns, ", count,
        ", got ", offsets[0], " to ", offsets[sets]);
  for (int64_t k = 0; k < sets; ++k) {
    check(offsets[k] <= offsets[k + 1], op, ": offsets must not fall, got ", offsets[k], " before ", offsets[k + 1]);
    for (int64_t i = offsets[k]; i < offsets[k + 1]; ++i) {
      check(columns[i] >= 0 && columns[i] < width && (i == offsets[k] || columns[i - 1] < columns[i]), op,
            ": the columns of a set must rise within [0, ", width, "), got ", columns[i]);
    }
  }
}

inline ElementType element_type(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: check(false, op, ": expected float32, bfloat16, float16 or float64, got ", name_of(type));
  }
  return kFloat32;
}

// The problem as every row sees it.
struct Rows {
  ElementType type;
  int64_t element_size;
  int64_t count;    // rows
  int64_t width;    // columns in memory
  int64_t columns;  // columns that belong to the vocabulary
  int64_t stride;   // bytes from row to row
  char* logits;
  Tensor labels_tensor;
  const int64_t* labels;
  int64_t ignore_index;
  double scale;
  RowMap map;  // of a row from which no constant was subtracted
  Tensor anchors_tensor;
  const void* anchors;  // [2, count] in the accumulation type, or null
  const RowKernels* kernels;
  int64_t threads;

  char* row(int64_t i) const { return logits + i * stride; }
  // The constant subtracted from row i, and the exact logit of its label.
  double lacks(int64_t i) const { return anchor(i); }
  double label_logit(int64_t i) const { return anchor(count + i); }
  double anchor(int64_t k) const {
    if (!anchors) return 0.0;
    return type == kFloat64 ? static_cast<const double*>(anchors)[k] : static_cast<const float*>(anchors)[k];
  }
  RowMap map_of(int64_t i) const {
    RowMap own = map;
    own.offset = map.inner * lacks(i);
    return own;
  }
  // What z of row i lacks: nothing under a softcap, as tanh is applied to the complete logit.
  double z_lacks(int64_t i) const { return map.softcap ? 0.0 : map.nat * lacks(i); }
  bool ignored(int64_t i) const { return labels[i] == ignore_index; }
  ScalarType acc() const { return type == kFloat64 ? ScalarType::Double : ScalarType::Float; }
  // Rows per task of parallel_for: about 32768 elements are worth a thread.
  int64_t grain() const { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns)); }
  bool split_columns() const { return count < 4 * threads && columns >= 2 * kPiece && threads > 1; }
  int64_t pieces() const { return (columns + kPiece - 1) / kPiece; }
};

// Without logits.
inline Rows problem(ElementType type, const Tensor& labels, int64_t ignore_index, double scale, double softcap,
                    int64_t vocab_size) {
  Rows rows{};
  rows.type = type;
  rows.element_size = type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2;
  rows.count = labels.size(0);
  rows.columns = vocab_size;
  rows.labels_tensor = dense(labels);
  rows.labels = data_of<int64_t>(rows.labels_tensor);
  rows.ignore_index = ignore_index;
  rows.scale = scale;
  rows.map.softcap = softcap > 0;
  rows.map.nat = softcap > 0 ? softcap : scale;
  rows.map.c = type == kFloat64 ? rows.map.nat : double(float(rows.map.nat * kLog2E));
  rows.map.inner = softcap > 0 ? scale / softcap : 0.0;
  rows.map.offset = 0.0;
  rows.kernels = &isa_kernels().rows[type];
  rows.threads = torch::stable::get_num_threads();
  return rows;
}

inline Rows describe(const char* op, const Tensor& logits, const Tensor& labels, int64_t ignore_index, double scale,
                     double softcap, int64_t vocab_size, const Optional& anchors) {
  check_token_arguments(op, logits, labels, scale, softcap, vocab_size);
  check(logits.is_cpu() && labels.is_cpu(), op, ": logits and labels must be CPU tensors");
  Rows rows = problem(element_type(op, logits.scalar_type()), labels, ignore_index, scale, softcap, vocab_size);
  rows.width = logits.size(1);
  rows.stride = logits.stride(0) * rows.element_size;
  rows.logits = static_cast<char*>(logits.data_ptr());
  check_row_pairs(op, "anchors", anchors, rows.count, rows.acc());
  if (anchors) {
    check(anchors->is_cpu(), op, ": anchors must be a CPU tensor");
    rows.anchors_tensor = dense(*anchors);
    rows.anchors = rows.anchors_tensor.const_data_ptr();
  }
  return rows;
}

// d z / d logit of one logit: scale * (1 - tanh^2), with 1 - tanh^2 = 1 / cosh^2.
inline double slope_at(const Rows& rows, double logit) {
  if (!rows.map.softcap) return rows.scale;
  const double inverse = 1.0 / std::cosh(rows.map.inner * logit);
  return rows.scale * inverse * inverse;
}

// y of row i's label as stored, and exact; z = nat * y + z_lacks.
inline double stored_label_y(const Rows& rows, int64_t i) {
  return rows.kernels->y_of(rows.row(i) + rows.labels[i] * rows.element_size, rows.map_of(i));
}
inline double label_y(const Rows& rows, int64_t i) {
  if (!rows.anchors) return stored_label_y(rows, i);
  return rows.map.softcap ? std::tanh(rows.map.inner * rows.label_logit(i)) : rows.label_logit(i) - rows.lacks(i);
}

// d z / d logit at row i's label.
inline double label_slope(const Rows& rows, int64_t i) {
  if (rows.anchors) return slope_at(rows, rows.label_logit(i));
  return slope_at(rows, load_element(rows.type, rows.row(i) + rows.labels[i] * rows.element_size));
}

// softmax = E^(c y - shift) * factor.
struct Shift {
  double shift, factor;
};

// The shift nearest to lse that the accumulation type represents; the remainder goes into the factor.
inline Shift shift_of(const Rows& rows, double lse) {
  const double exact = lse / rows.map.nat * rows.map.c;
  if (rows.type == kFloat64) return {exact, 1.0};
  const double shift = double(float(exact));
  return {shift, std::exp2(shift - exact)};
}

}  // namespace
}  // namespace cpo
