// The row kernels for the portable vectors; setup.py gives this file its processor flags.
#include "token_logps.h"

namespace cpo {
namespace {
#include "scalar16.h"
#include "vec_portable.h"
#include "token_logps_rows.h"
#include "live_columns_rows.h"

const IsaKernels kKernels = {
    {row_kernels<float>(), row_kernels<BFloat16>(), row_kernels<Half>(), row_kernels<double>()}};
}  // namespace

const IsaKernels* kernels_portable() { return &kKernels; }

}  // namespace cpo
