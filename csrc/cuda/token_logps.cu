// token_logps_fwd, token_logps_bwd_, token_logps_fused_ on the GPU: checks, outputs and launches.
#include <cstdlib>

#include "token_arguments.h"

namespace cpo::cuda {
namespace {

// Needs a copy from the device and a synchronisation; without this check a label out of range makes its row NaN.
void check_labels_if_asked(const char* op, const Tensor& labels, int64_t ignore_index, int64_t vocab_size,
                           void* stream) {
  const char* wanted = std::getenv("CPO_KERNELS_CHECK");
  if (!wanted || std::string(wanted) != "1") return;
  std::vector<int64_t> copy(labels.numel());
  copy_to_host(op, copy.data(), labels.const_data_ptr(), copy.size() * sizeof(int64_t), stream);
  check_labels(op, copy.data(), int64_t(copy.size()), ignore_index, vocab_size);
}

template <typename T>
Plan plan_on(const char* op, const Problem<T>& p, bool softcap, bool extras, const OnDeviceOf& on) {
  const DeviceInfo info = device_info(op, on.device(), fused_kernel<T, kTokenThreads, false, false, false>);
  return plan_of<kTokenThreads>(p, softcap, extras, info);
}

template <typename T>
void forward_typed(const char* op, const Tensor& logits, const Tensor& labels, const Head& head,
                   const Optional& anchors, bool overwrite, bool extras, Tensor& logp, Tensor& lse, Tensor& extra,
                   const OnDeviceOf& on) {
  using Acc = AccOf<T>;
  const Problem<T> p = problem_in<T>(logits, labels, head, anchors, overwrite);
  const Plan plan = plan_on(op, p, head.softcap > 0, extras, on);
  Tensor scratch = new_vector(logp, scratch_size(p, plan, overwrite), logp.scalar_type());
  const Outputs<Acc> out{mutable_data_of<Acc>(logp), mutable_data_of<Acc>(lse),
                         extras ? mutable_data_of<Acc>(extra) : nullptr};
  token_logps_forward<kTokenThreads>(op, p, out, overwrite, head.softcap > 0, extras, plan,
                                     mutable_data_of<Acc>(scratch), on.stream());
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& logits, Tensor labels, const Head& head,
                                           Optional anchors, bool overwrite, bool extras) {
  check_token_arguments_on_device(op, logits, labels, head, anchors);
  if (overwrite) check_writable(op, logits);
  const OnDeviceOf on(logits);
  labels = dense(labels), anchors = dense_pairs(anchors);
  check_labels_if_asked(op, labels, head.ignore_index, head.vocab_size, on.stream());
  const int64_t rows = logits.size(0);
  const ScalarType acc = acc_type(logits);
  Tensor logp = new_vector(logits, rows, acc), lse = new_vector(logits, rows, acc);
  Tensor extra = extras ? torch::stable::new_empty(logits, {4, rows}, acc) : new_vector(logits, 0, acc);
  if (rows > 0) {
    with_type_of(logits, [&](auto zero) {
      forward_typed<decltype(zero)>(op, logits, labels, head, anchors, overwrite, extras, logp, lse, extra, on);
    });
  }
  return {logp, lse, extra};
}

template <typename T>
void backward_typed(const char* op, const Tensor& logits, const Tensor& labels, const Head& head,
                    const Optional& anchors, const Optional& entropies, const Tensor& lse, const Tensor& grad,
                    const OnDeviceOf& on) {
  using Acc = AccOf<T>;
  const Problem<T> p = problem_in<T>(logits, labels, head, anchors, true);
  const Plan plan = plan_on(op, p, head.softcap > 0, false, on);
  token_logps_backward<kTokenThreads>(op, p, data_of<Acc>(lse), data_of<Acc>(grad), data_of_pairs<T>(entropies),
                                      head.softcap > 0, plan, on.stream());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logps_fwd(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                   double softcap, int64_t vocab_size, bool extras, Optional anchors) {
  return forward("token_logps_fwd", logits, labels, {ignore_index, vocab_size, scale, softcap}, anchors, false, extras);
}

std::tuple<Tensor, Tensor, Tensor> token_logps_fused_(Tensor logits, Tensor labels, int64_t ignore_index, double scale,
                                                      double softcap, int64_t vocab_size, bool extras,
                                                      Optional anchors) {
  return forward("token_logps_fused_", logits, labels, {ignore_index, vocab_size, scale, softcap}, anchors, true,
                 extras);
}

void token_logps_bwd_(Tensor logits, Tensor labels, Tensor lse, Tensor grad, int64_t ignore_index, double scale,
                      double softcap, int64_t vocab_size, Optional anchors, Optional entropies) {
  const char* op = "token_logps_bwd_";
  const Head head{ignore_index, vocab_size, scale, softcap};
  check_token_arguments_on_device(op, logits, labels, head, anchors);
  check_writable(op, logits);
  check_row_values(lse, grad, logits.size(0), acc_type(logits));
  check_device("lse", lse, "logits", logits);
  check_device("grad", grad, "logits", logits);
  check_row_pairs(op, "entropies", entropies, logits.size(0), acc_type(logits));
  if (entropies) check_device("entropies", *entropies, "logits", logits);
  if (logits.size(0) == 0) return;
  const OnDeviceOf on(logits);
  labels = dense(labels), anchors = dense_pairs(anchors), entropies = dense_pairs(entropies);
  lse = dense(lse);
  grad = dense(grad);
  check_labels_if_asked(op, labels, ignore_index, vocab_size, on.stream());
  with_type_of(logits, [&](auto zero) {
    backward_typed<decltype(zero)>(op, logits, labels, head, anchors, entropies, lse, grad, on);
  });
}

}  // namespace cpo::cuda
