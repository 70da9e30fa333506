// Checks and small helpers over the stable ABI that every op uses.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace cpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct Shape {
  const Tensor& tensor;
};
inline Shape shape_of(const Tensor& t) { return {t}; }

// Messages are built without iostreams: in a process with several copies of libstdc++ their locale may be another
// copy's. CPU preference on an H200's machine (torch 2.11) ended in std::codecvt, which only streams reach.
inline void append(std::string& out, const char* text) { out += text; }
inline void append(std::string& out, const std::string& text) { out += text; }
template <typename Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
void append(std::string& out, Number number) {
  if constexpr (std::is_floating_point_v<Number>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", double(number));
    out += digits;
  } else {
    out += std::to_string(number);
  }
}
inline void append(std::string& out, Shape shape) {
  out += '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) {
    if (i) out += ", ";
    append(out, shape.tensor.size(i));
  }
  out += ']';
}

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

// Throws with a message concatenated from `parts`; Python gets a RuntimeError.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error(joined(parts...));
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Char: return "int8";
    default: return "another dtype";
  }
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType type) {
  check(t.scalar_type() == type, name, " must be ", name_of(type), ", got ", name_of(t.scalar_type()));
}

// One dimension of `size` elements.
inline void check_vector(const char* name, const Tensor& t, int64_t size) {
  check(t.dim() == 1 && t.size(0) == size, name, " must have shape [", size, "], got ", shape_of(t));
}

inline void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ", columns,
        "], got ", shape_of(t));
}

// A tensor with 0 elements means "not given".
inline bool given(const Tensor& t) { return t.numel() > 0; }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor new_vector(const Tensor& like, int64_t size, ScalarType type) {
  return torch::stable::new_empty(like, {size}, type);
}

// The ops (CPU). Shapes and formulas: cpo_kernels/library.py.
std::tuple<Tensor, Tensor, Tensor> token_logps_fwd(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                   double softcap, int64_t vocab_size, bool extras, Optional anchors);
void token_logps_bwd_(Tensor logits, Tensor labels, Tensor lse, Tensor grad, int64_t ignore_index, double scale,
                      double softcap, int64_t vocab_size, Optional anchors, Optional entropies);
std::tuple<Tensor, Tensor, Tensor> token_logps_fused_(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                      double softcap, int64_t vocab_size, bool extras,
                                                      Optional anchors);
std::tuple<Tensor, Tensor, Tensor> live_columns(Tensor logits, Tensor labels, Tensor lse, double eps, int64_t set_rows,
                                                int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                                                Optional anchors);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> list_live_columns(
    Tensor logits, Tensor labels, Tensor lse, double eps, int64_t set_rows, int64_t ignore_index, double scale,
    double softcap, int64_t vocab_size, int64_t most, double tail_unit, Optional anchors);
Tensor live_grads(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                  int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                  Optional anchors);
void live_grads_(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                 int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                 Optional anchors, Tensor out);
Tensor live_sum(Tensor tail, Tensor tails, Tensor made, Tensor columns, Tensor offsets);
void live_sums_(Tensor g, Tensor columns, Tensor offsets, int64_t set_rows, Tensor weight, Tensor label_columns,
                Tensor label_grads, Tensor out);
void live_sums_of_logits_(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                          int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                          Optional anchors, Tensor weight, Tensor label_columns, Tensor label_grads, Tensor means,
                          Tensor coef, Tensor room, Tensor out, Tensor tau);
Tensor live_dw(Tensor g, Tensor columns, Tensor offsets, int64_t set_rows, Tensor x, Tensor coef, Tensor tail,
               Tensor tails, Tensor label_columns, Tensor label_grads, int64_t rows);
void add_product_(Tensor total, Tensor low, Tensor a, Tensor b, bool first, bool last, double factor);
void logits_(Tensor x, Tensor weight, Tensor bias, Tensor lacks, Tensor out);
std::tuple<Tensor, Tensor> linear_token_logps_fwd(Tensor x, Tensor weight, Tensor bias, Tensor labels,
                                                  int64_t ignore_index, double scale, int64_t vocab_size,
                                                  Tensor anchors);
Tensor relative_anchors(Tensor x, Tensor weight, Tensor labels, Tensor few, double scale, double softcap, Tensor room);
bool has_bf16_matmuls();  // for logits_, relative_anchors, live_sums_, live_dw, and sums of add_product_ in float32
bool has_tiles();         // for linear_..., and sums of add_product_ in bfloat16

// Asks the system for pages of 2 MB in memory that is not yet written, of a block of at least kHugeBytes: glibc maps
// such a block on its own and unmaps it when it is freed, unless a place of that size is free in the heap. Where the
// system gives them only if asked (`madvise`), writing 96 MiB of new memory for the first time takes 37 to 47 ms in
// pages of 4 kB and 13 in those (two cores; 8 ms again).
constexpr int64_t kHugeBytes = int64_t(32) << 20;
void prefer_huge_pages(void* data, int64_t bytes, int64_t bytes_of_block);
Tensor sequence_sum(Tensor token_logps, Tensor cu_seqlens, Tensor token_weights, bool average);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference(
    Tensor seq_logps, Tensor ref_logps, Tensor lengths, Tensor pairs, Tensor scores, Tensor conditions,
    Tensor objectives, Tensor pair_weights, Tensor pair_betas, Tensor margins, std::vector<int64_t> loss_types,
    std::vector<double> loss_weights, std::vector<double> options, double num_pairs, double chosen_tokens);

}  // namespace cpo
