// The row kernels for AVX2, FMA and F16C; setup.py gives this file its processor flags.
#include "token_logps.h"

#include <immintrin.h>
namespace cpo {
namespace {
#include "scalar16.h"
#include "vec_avx2.h"
#include "token_logps_rows.h"
#include "live_columns_rows.h"

const IsaKernels kKernels = {
    {row_kernels<float>(), row_kernels<BFloat16>(), row_kernels<Half>(), row_kernels<double>()}};
}  // namespace

const IsaKernels* kernels_avx2() { return &kKernels; }

}  // namespace cpo
