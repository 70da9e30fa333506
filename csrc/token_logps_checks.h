// Checks of the token ops' arguments on every device.
#pragma once

#include <cmath>

#include "common.h"

namespace cpo {

inline void check_logit_type(const char* op, const char* name, ScalarType type) {
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
            type == ScalarType::Double,
        op, ": ", name, " must be float32, bfloat16, float16 or float64, got ", name_of(type));
}

inline void check_token_arguments(const char* op, const Tensor& logits, const Tensor& labels, double scale,
                                  double softcap, int64_t vocab_size) {
  check(logits.dim() == 2, op, ": logits must have shape [N, V], got ", shape_of(logits));
  check_logit_type(op, "logits", logits.scalar_type());
  check(vocab_size >= 1 && vocab_size <= logits.size(1), op, ": vocab_size must be in [1, ", logits.size(1),
        "] (the columns of logits), got ", vocab_size);
  check(logits.size(1) == 1 || logits.stride(1) == 1, op,
        ": logits must have unit stride over the vocabulary, got stride ", logits.stride(1),
        "; call .contiguous() first");
  check(logits.stride(0) >= 0, op, ": logits must have a non-negative row stride, got ", logits.stride(0));
  check_dtype("labels", labels, ScalarType::Long);
  check_vector("labels", labels, logits.size(0));
  check(scale > 0 && std::isfinite(scale), op, ": scale must be a positive number, got ", scale);
  check(softcap >= 0 && std::isfinite(softcap), op, ": softcap must be positive, or 0 for none, got ", softcap);
}

inline void check_labels(const char* op, const int64_t* labels, int64_t rows, int64_t ignore_index,
                         int64_t vocab_size) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = labels[i];
    check(label == ignore_index || (label >= 0 && label < vocab_size), op, ": label ", label, " at row ", i,
          " is out of range: it must be in [0, ", vocab_size, ") or equal ignore_index = ", ignore_index);
  }
}

inline void check_writable(const char* op, const Tensor& logits) {
  check(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1), op,
        ": logits are overwritten, so their rows must not overlap; got row stride ", logits.stride(0), " for ",
        logits.size(1), " columns");
}

// lse and grad of token_logps_bwd_.
inline void check_row_values(const Tensor& lse, const Tensor& grad, int64_t rows, ScalarType type) {
  check_dtype("lse", lse, type);
  check_dtype("grad", grad, type);
  check_vector("lse", lse, rows);
  check_vector("grad", grad, rows);
}

// anchors [2, N] and entropies [2, N], if given.
inline void check_row_pairs(const char* op, const char* name, const std::optional<Tensor>& pairs, int64_t rows,
                            ScalarType type) {
  if (!pairs) return;
  check(pairs->scalar_type() == type, op, ": ", name, " must be ", name_of(type), ", got ",
        name_of(pairs->scalar_type()));
  check_matrix(name, *pairs, 2, rows);
}

// live_sum: tail [sets, v], tails [sets, H], made [columns, H], offsets [sets + 1].
inline void check_sum_arguments(const char* op, const Tensor& tail, const Tensor& tails, const Tensor& made,
                                const Tensor& columns, const Tensor& offsets) {
  check(tail.dim() == 2 && tails.dim() == 2 && made.dim() == 2, op, ": tail, tails and made must be matrices, got ",
        shape_of(tail), ", ", shape_of(tails), " and ", shape_of(made));
  const ScalarType type = made.scalar_type();
  check_logit_type(op, "made", type);
  check_dtype("tail", tail, type);
  check_dtype("tails", tails, type == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_dtype("columns", columns, ScalarType::Long);
  check_dtype("offsets", offsets, ScalarType::Long);
  check_matrix("tails", tails, tail.size(0), tails.size(1));
  check_matrix("made", made, columns.numel(), tails.size(1));
  check_vector("columns", columns, columns.numel());
  check_vector("offsets", offsets, tail.size(0) + 1);
  check(tail.size(1) <= 1 || tail.stride(1) == 1, op, ": tail must have unit stride over the columns, got stride ",
        tail.stride(1), "; call .contiguous() first");
}

}  // namespace cpo
