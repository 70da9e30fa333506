// What the ops over logits [N, V] on the GPU share: the head's options, checks, and the arguments of their kernels.
#pragma once

#include "../token_logps_checks.h"
#include "ops.h"
#include "token_logps_launch.h"

namespace cpo::cuda {

constexpr int64_t kMaxColumns = int64_t(1) << 30;  // column indices are 32-bit, row addresses 64-bit

struct Head {
  int64_t ignore_index, vocab_size;
  double scale, softcap;
};

inline ScalarType acc_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_token_arguments_on_device(const char* op, const Tensor& logits, const Tensor& labels,
                                            const Head& head, const Optional& anchors) {
  check_token_arguments(op, logits, labels, head.scale, head.softcap, head.vocab_size);
  check_row_pairs(op, "anchors", anchors, logits.size(0), acc_type(logits));
  check(logits.is_cuda(), op, ": logits must be a CUDA tensor");
  check_device("labels", labels, "logits", logits);
  if (anchors) check_device("anchors", *anchors, "logits", logits);
  check(logits.size(0) <= kMaxGrid, op, ": logits may have at most ", kMaxGrid, " rows, got ", logits.size(0));
  check(logits.size(1) <= kMaxColumns, op, ": logits may have at most ", kMaxColumns, " columns, got ", logits.size(1));
}

inline Optional dense_pairs(const Optional& t) { return t ? Optional(dense(*t)) : t; }

// Null if not given.
template <typename T>
const AccOf<T>* data_of_pairs(const Optional& pairs) {
  return pairs ? data_of<AccOf<T>>(*pairs) : nullptr;
}

// Calls run(T{}) with the type of the logits' numbers.
template <typename Run>
void with_type_of(const Tensor& logits, const Run& run) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Double: return run(double{});
    case ScalarType::BFloat16: return run(BFloat16{});
    default: return run(Half{});
  }
}

// overwritten: if false, the pointer is taken as const, so that a copy-on-write tensor is not copied.
template <typename T>
Problem<T> problem_in(const Tensor& logits, const Tensor& labels, const Head& head, const Optional& anchors,
                      bool overwritten) {
  void* data = overwritten ? logits.mutable_data_ptr() : const_cast<void*>(logits.const_data_ptr());
  return problem_of(static_cast<T*>(data), data_of<int64_t>(labels), logits.size(0), logits.stride(0), logits.size(1),
                    head.vocab_size, head.ignore_index, head.scale, head.softcap, data_of_pairs<T>(anchors));
}

}  // namespace cpo::cuda
