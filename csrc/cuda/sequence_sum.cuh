// sequence_sum: L_s = sum of m_t logp_t over the tokens [cu[s], cu[s + 1]), in float64. One block per sequence: thread
// t adds the tokens t, t + kThreads, ..., and the block adds the sums of its threads in a fixed order.
#pragma once

#include "block_sum.h"
#include "device.h"

namespace cpo::cuda {

constexpr int kTokensInFlight = 4;  // loads of a thread before the first is used

// logps, weights [tokens] (weights may be null), cu [sequences + 1], out [sequences]: NaN if cu leaves [0, tokens].
template <typename T, int kThreads>
CPO_KERNEL(kThreads, 1)
sequence_sum_kernel(const T* logps, const int64_t* cu, const T* weights, bool average, int64_t tokens, T* out) {
  const int64_t sequence = block_index(), begin = cu[sequence], end = cu[sequence + 1];
  if (begin < 0 || end > tokens || begin > end) {
    if (thread_index() == 0) out[sequence] = T(NAN);
    return;
  }
  double total = 0.0;
  for (int64_t first = begin + thread_index(); first < end; first += kTokensInFlight * kThreads) {
    T x[kTokensInFlight], m[kTokensInFlight];
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) {
      const int64_t token = first + i * kThreads;
      x[i] = token < end ? logps[token] : T(0);
      m[i] = weights && token < end ? weights[token] : T(1);
    }
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) total += double(x[i]) * double(m[i]);
  }
  total = block_sum<kThreads>(total, shared<void>());
  if (average) total /= end > begin ? double(end - begin) : 1.0;
  if (thread_index() == 0) out[sequence] = T(total);
}

template <typename T, int kThreads = 256>
void launch_sequence_sum(const T* logps, const int64_t* cu, const T* weights, bool average, int64_t tokens,
                         int64_t sequences, T* out, void* stream) {
  if (sequences == 0) return;
  const LaunchShape shape{sequences, kThreads, 1, kThreads / kWarp * int(sizeof(double)), stream};
  launch("sequence_sum", shape, sequence_sum_kernel<T, kThreads>, logps, cu, weights, average, tokens, out);
}

}  // namespace cpo::cuda
