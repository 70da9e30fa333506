// cpo_kernels._C_cuda: loading it registers the CUDA kernels. The schemas are defined by cpo_kernels/library.py.
#include <Python.h>

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(cpo_kernels, CUDA, m) {
  m.impl("token_logps_fwd", TORCH_BOX(&cpo::cuda::token_logps_fwd));
  m.impl("token_logps_bwd_", TORCH_BOX(&cpo::cuda::token_logps_bwd_));
  m.impl("token_logps_fused_", TORCH_BOX(&cpo::cuda::token_logps_fused_));
  m.impl("live_columns", TORCH_BOX(&cpo::cuda::live_columns));
  m.impl("live_grads", TORCH_BOX(&cpo::cuda::live_grads));
  m.impl("live_sum", TORCH_BOX(&cpo::cuda::live_sum));
  m.impl("sequence_sum", TORCH_BOX(&cpo::cuda::sequence_sum));
  m.impl("preference", TORCH_BOX(&cpo::cuda::preference));
}

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of cpo_kernels", -1, nullptr};
  return PyModule_Create(&module);
}
