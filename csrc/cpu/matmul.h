// The CPU's own matmuls, of bfloat16 numbers on processors with instructions for them.
#pragma once

#include "rows.h"

namespace cpo {

// Raises if there are none here.
const Bf16Matmul& bf16_matmul(const char* op);

namespace {

inline int64_t panels_of(int64_t width) { return (width + kPanel - 1) / kPanel; }

inline void check_bf16_matrix(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 2, op, ": ", name, " must be a matrix, got shape ", shape_of(t));
  check_dtype(name, t, ScalarType::BFloat16);
  check(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", name, " must have unit stride over its columns, got stride ",
        t.stride(1), "; call .contiguous() first");
}

}  // namespace
}  // namespace cpo
