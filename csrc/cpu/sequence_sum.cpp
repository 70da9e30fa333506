// sequence_sum on the CPU: L_s = sum of weight * logp over the tokens of s, in float64, in token order, compensated.
#include <cmath>

#include "../common.h"

namespace cpo {
namespace {

// A float64 sum that carries the rounding errors of its additions (Neumaier 1974): its error is about one rounding of
// sum |x|, for any number of terms. Plain float64 additions of 67,000 log-probs were off by up to 8 roundings, and by
// more with more terms.
struct Sum {
  double total = 0.0, lost = 0.0;

  void add(double x) {
    const double next = total + x;
    lost += std::abs(total) >= std::abs(x) ? (total - next) + x : (x - next) + total;
    total = next;
  }
  // If a term is not finite, `lost` is NaN and the plain sum is the result.
  double value() const { return std::isfinite(total) ? total + lost : total; }
};

template <typename T>
void sum_sequences(const T* logps, const int64_t* cu, const T* weights, bool average, int64_t sequences, T* out) {
  const int64_t tokens = cu[sequences];
  const int64_t grain = sequences * 32768 / std::max<int64_t>(tokens, 1) + 1;
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      Sum sum;
      for (int64_t t = cu[s]; t < cu[s + 1]; ++t) sum.add(weights ? double(weights[t]) * logps[t] : double(logps[t]));
      double total = sum.value();
      if (average) total /= double(std::max<int64_t>(1, cu[s + 1] - cu[s]));
      out[s] = T(total);
    }
  });
}

}  // namespace

Tensor sequence_sum(Tensor token_logps, Tensor cu_seqlens, Tensor token_weights, bool average) {
  const char* op = "sequence_sum";
  const ScalarType type = token_logps.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, op, ": token_logps must be float32 or float64, got ",
        name_of(type));
  check(token_logps.dim() == 1, op, ": token_logps must have shape [N], got ", shape_of(token_logps));
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Long);
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": cu_seqlens must have shape [S + 1], got ",
        shape_of(cu_seqlens));
  if (given(token_weights)) {
    check_dtype("token_weights", token_weights, type);
    check_vector("token_weights", token_weights, token_logps.size(0));
  }
  token_logps = dense(token_logps);
  cu_seqlens = dense(cu_seqlens);
  token_weights = dense(token_weights);
  const int64_t* cu = data_of<int64_t>(cu_seqlens);
  const int64_t sequences = cu_seqlens.size(0) - 1, tokens = token_logps.size(0);
  check(cu[0] >= 0 && cu[sequences] <= tokens, op, ": cu_seqlens must lie in [0, ", tokens,
        "] (the number of tokens), got ", cu[0], " to ", cu[sequences]);
  for (int64_t s = 0; s < sequences; ++s) {
    check(cu[s] <= cu[s + 1], op, ": cu_seqlens must not decrease, got ", cu[s], " before ", cu[s + 1], " at ", s);
  }
  Tensor out = new_vector(token_logps, sequences, type);
  const bool weighted = given(token_weights);
  if (type == ScalarType::Double) {
    sum_sequences(data_of<double>(token_logps), cu, weighted ? data_of<double>(token_weights) : nullptr, average,
                  sequences, mutable_data_of<double>(out));
  } else {
    sum_sequences(data_of<float>(token_logps), cu, weighted ? data_of<float>(token_weights) : nullptr, average,
                  sequences, mutable_data_of<float>(out));
  }
  return out;
}

}  // namespace cpo
