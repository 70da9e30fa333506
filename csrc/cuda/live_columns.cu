// live_columns, live_grads and live_sum on the GPU: checks, outputs and launches.
#include "live_columns.cuh"

#include <algorithm>

#include "token_arguments.h"

namespace cpo::cuda {
namespace {

// Checks lse and other per-row tensors, which must be on the device of the logits.
void check_arguments(const char* op, const Tensor& logits, const Tensor& labels, const Tensor& lse,
                     const Tensor& row_sums, const Optional& anchors, int64_t set_rows, const Head& head) {
  check_token_arguments_on_device(op, logits, labels, head, anchors);
  check(set_rows >= 1, op, ": set_rows must be at least 1, got ", set_rows);
  for (const auto& [name, t] : {std::pair{"lse", &lse}, std::pair{"row_sums", &row_sums}}) {
    check_dtype(name, *t, acc_type(logits));
    check_vector(name, *t, logits.size(0));
    check_device(name, *t, "logits", logits);
  }
}

// columns [sum of a_k] stay on the device, unread by the host; offsets [sets + 1] on the host give their numbers.
void check_columns(const char* op, const Tensor& columns, Tensor& offsets, int64_t sets, const char* like_name,
                   const Tensor& like) {
  check_dtype("columns", columns, ScalarType::Long);
  check_device("columns", columns, like_name, like);
  check_dtype("offsets", offsets, ScalarType::Long);
  check_vector("offsets", offsets, sets + 1);
  check(offsets.is_cpu(), op, ": offsets must be a CPU tensor");
  offsets = dense(offsets);
  const int64_t* ends = data_of<int64_t>(offsets);
  check(ends[0] == 0 && ends[sets] == columns.numel() && std::is_sorted(ends, ends + sets + 1), op,
        ": offsets must rise from 0 to the number of columns, ", columns.numel(), ", got ", ends[0], " to ",
        ends[sets]);
}

Tensor on_device_of(const char* op, const Tensor& columns, const Tensor& offsets, void* stream) {
  Tensor out = new_vector(columns, offsets.numel(), ScalarType::Long);
  copy_to_device(op, out.mutable_data_ptr(), offsets.const_data_ptr(), size_t(offsets.numel()) * sizeof(int64_t),
                 stream);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> live_columns(Tensor logits, Tensor labels, Tensor lse, double eps, int64_t set_rows,
                                                int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                                                Optional anchors) {
  const char* op = "live_columns";
  const Head head{ignore_index, vocab_size, scale, softcap};
  check_arguments(op, logits, labels, lse, lse, anchors, set_rows, head);
  const OnDeviceOf on(logits);
  labels = dense(labels), lse = dense(lse), anchors = dense_pairs(anchors);
  const int64_t rows = logits.size(0), sets = shares(rows, set_rows);
  Tensor live = torch::stable::new_empty(logits, {sets, vocab_size}, ScalarType::Bool);
  Tensor tail = torch::stable::new_empty(logits, {sets, vocab_size}, lse.scalar_type());
  Tensor row_sums = new_vector(logits, rows, lse.scalar_type());
  if (rows == 0) return {live, tail, row_sums};
  with_type_of(logits, [&](auto zero) {
    using T = decltype(zero);
    using Acc = AccOf<T>;
    const Problem<T> p = problem_in<T>(logits, labels, head, anchors, false);
    check(sets * shares(vocab_size, kTile<T>) <= kMaxGrid, op, ": ", sets, " sets are too many: raise set_rows");
    Tensor scratch = new_vector(lse, live_scratch_size(p), lse.scalar_type());
    launch_live_columns(op, p, data_of<Acc>(lse), eps, set_rows, softcap > 0, mutable_data_of<Acc>(scratch),
                        mutable_data_of<bool>(live), mutable_data_of<Acc>(tail), mutable_data_of<Acc>(row_sums),
                        on.stream());
  });
  return {live, tail, row_sums};
}

Tensor live_grads(Tensor logits, Tensor labels, Tensor lse, Tensor row_sums, Tensor columns, Tensor offsets,
                  int64_t set_rows, int64_t ignore_index, double scale, double softcap, int64_t vocab_size,
                  Optional anchors) {
  const char* op = "live_grads";
  const Head head{ignore_index, vocab_size, scale, softcap};
  check_arguments(op, logits, labels, lse, row_sums, anchors, set_rows, head);
  const int64_t rows = logits.size(0), sets = shares(rows, set_rows);
  check_columns(op, columns, offsets, sets, "logits", logits);
  const OnDeviceOf on(logits);
  labels = dense(labels), lse = dense(lse), row_sums = dense(row_sums), columns = dense(columns);
  anchors = dense_pairs(anchors);
  const int64_t* ends = data_of<int64_t>(offsets);
  int64_t total = 0;
  for (int64_t k = 0; k < sets; ++k) { total += std::min(set_rows, rows - k * set_rows) * (ends[k + 1] - ends[k] + 1); }
  Tensor out = new_vector(logits, total, logits.scalar_type());
  if (rows == 0) return out;
  const Tensor device_offsets = on_device_of(op, columns, offsets, on.stream());
  with_type_of(logits, [&](auto zero) {
    using T = decltype(zero);
    using Acc = AccOf<T>;
    launch_live_grads(op, problem_in<T>(logits, labels, head, anchors, false), data_of<Acc>(lse),
                      data_of<Acc>(row_sums), data_of<int64_t>(columns), data_of<int64_t>(device_offsets), set_rows,
                      softcap > 0, mutable_data_of<T>(out), on.stream());
  });
  return out;
}

Tensor live_sum(Tensor tail, Tensor tails, Tensor made, Tensor columns, Tensor offsets) {
  const char* op = "live_sum";
  check_sum_arguments(op, tail, tails, made, columns, offsets);
  const int64_t sets = tail.size(0), rows = tail.size(1), width = tails.size(1);
  check(made.is_cuda(), op, ": made must be a CUDA tensor");
  check_device("tail", tail, "made", made);
  check_device("tails", tails, "made", made);
  check_columns(op, columns, offsets, sets, "made", made);
  const OnDeviceOf on(made);
  tails = dense(tails), made = dense(made), columns = dense(columns);
  Tensor out = torch::stable::new_empty(made, {rows, width}, made.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor device_offsets = on_device_of(op, columns, offsets, on.stream());
  with_type_of(made, [&](auto zero) {
    using T = decltype(zero);
    using Acc = AccOf<T>;
    const int64_t finding = shares(sets * padded_rows(rows), kSumThreads);
    const int64_t adding = padded_rows(rows) / kSumBlockRows * sum_tiles<T>(width);
    check(width <= kMaxColumns && columns.numel() <= kMaxGrid && finding <= kMaxGrid && adding <= kMaxGrid, op, ": ",
          sets, " sets of ", rows, " columns, ", columns.numel(), " of them live, and rows of ", width,
          " are too many: add fewer columns of the vocabulary at a time");
    Tensor scratch = new_vector(tails, sum_scratch_size(sets, rows), tails.scalar_type());
    launch_live_sum(op, data_of<T>(tail), tail.stride(0), data_of<Acc>(tails), data_of<T>(made),
                    data_of<int64_t>(columns), data_of<int64_t>(device_offsets), sets, rows, width,
                    mutable_data_of<Acc>(scratch), mutable_data_of<T>(out), on.stream());
  });
  return out;
}

}  // namespace cpo::cuda
