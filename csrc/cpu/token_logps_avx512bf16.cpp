// The kernels for AVX-512 with the bfloat16 instructions, with and without AMX; setup.py gives this file its processor
// flags.
#include "token_logps.h"

#include <immintrin.h>

#include <cstring>

#include "lines.h"

namespace cpo {
namespace {
#include "scalar16.h"
#include "vec_avx512.h"
#include "token_logps_rows.h"
#include "live_columns_rows.h"
#include "matmul_bf16.h"
#ifdef __AMX_BF16__
#include "matmul_amx.h"
#endif

constexpr IsaKernels kernels(Bf16Matmul matmul) {
  return {{row_kernels<float>(), row_kernels<BFloat16>(), row_kernels<Half>(), row_kernels<double>()}, matmul};
}
constexpr IsaKernels kAvx512Bf16 =
    kernels({add_matmul, pack_pairs, pack_x, logits_tile, scale_row<float>, split_row, join_row, scale_row<BFloat16>,
             add_row, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr});
#ifdef __AMX_BF16__
constexpr IsaKernels kAmx =
    kernels({nullptr, pack_pairs, pack_x_amx, logits_amx, scale_row<float>, split_row, join_row, scale_row<BFloat16>,
             add_row, tiles_of_rows, tiles_of_columns, tiles_of_b, add_tiles, add_tiles_to_rows, scan_logits});
#endif
}  // namespace

const IsaKernels* kernels_avx512bf16() { return &kAvx512Bf16; }
const IsaKernels* kernels_amx() {
#ifdef __AMX_BF16__
  return &kAmx;
#else
  return nullptr;
#endif
}

}  // namespace cpo
