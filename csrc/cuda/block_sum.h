// Sums over the threads of a block in a fixed order.
#pragma once

#include "device.h"

namespace cpo::cuda {

// The sum of every thread's x, returned to all of them. `scratch`, shared memory for kThreads / kWarp values, may be
// reused afterwards.
template <int kThreads, typename T>
CPO_DEVICE T block_sum(T x, void* scratch) {
  T* const sums = static_cast<T*>(scratch);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  if (thread_index() % kWarp == 0) sums[thread_index() / kWarp] = x;
  sync_block();
  T total = sums[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total += sums[warp];
  sync_block();
  return total;
}

}  // namespace cpo::cuda
