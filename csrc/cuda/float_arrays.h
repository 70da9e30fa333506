// Arrays of float64 or float32, distinguished at run time: the small ops always compute in float64, so one kernel
// serves every combination of dtypes.
#pragma once

#include "device.h"

namespace cpo::cuda {

struct FloatArray {
  const void* data;  // null if the array is not given
  bool is_double;

  CPO_DEVICE bool given() const { return data != nullptr; }
  CPO_DEVICE double at(int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i] : double(static_cast<const float*>(data)[i]);
  }
  // x[i] = element begin + i for i < count, the last one repeated beyond: all loads are in flight at once.
  template <int n>
  CPO_DEVICE void read(int64_t begin, int count, double (&x)[n]) const {
    if (is_double) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = static_cast<const double*>(data)[begin + (i < count ? i : count - 1)];
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = static_cast<const float*>(data)[begin + (i < count ? i : count - 1)];
    }
  }
};

struct FloatOutput {
  void* data;
  bool is_double;

  CPO_DEVICE void set(int64_t i, double x) const {
    if (is_double) {
      static_cast<double*>(data)[i] = x;
    } else {
      static_cast<float*>(data)[i] = float(x);
    }
  }
};

}  // namespace cpo::cuda
