// The row kernels for AVX-512 with the bfloat16 conversions; setup.py gives this file its processor flags.
#include "token_logps.h"

#include <immintrin.h>
namespace cpo {
namespace {
#include "scalar16.h"
#include "vec_avx512.h"
#include "token_logps_rows.h"
#include "live_columns_rows.h"
#include "matmul_bf16.h"

const IsaKernels kKernels = {
    {row_kernels<float>(), row_kernels<BFloat16>(), row_kernels<Half>(), row_kernels<double>()},
    {add_matmul, pack_pairs, logits_tile, scale_row<float>, scale_row<BFloat16>, add_row}};
}  // namespace

const IsaKernels* kernels_avx512bf16() { return &kKernels; }

}  // namespace cpo
