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

constexpr IsaKernels kernels(decltype(Bf16Matmul::add) add, decltype(Bf16Matmul::pack_x) pack,
                             decltype(Bf16Matmul::logits) logits) {
  return {{row_kernels<float>(), row_kernels<BFloat16>(), row_kernels<Half>(), row_kernels<double>()},
          {add, pack_pairs, pack, logits, scale_row<float>, scale_row<BFloat16>, add_row}};
}
constexpr IsaKernels kAvx512Bf16 = kernels(add_matmul, pack_x, logits_tile);
#ifdef __AMX_BF16__
constexpr IsaKernels kAmx = kernels(add_matmul_amx, pack_x_amx, logits_amx);
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
