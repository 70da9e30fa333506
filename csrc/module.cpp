// cpo_kernels._C: loading it registers the CPU kernels. The schemas are defined by cpo_kernels/library.py.
#include <Python.h>

#include "common.h"

STABLE_TORCH_LIBRARY_IMPL(cpo_kernels, CPU, m) {
  m.impl("token_logps_fwd", TORCH_BOX(&cpo::token_logps_fwd));
  m.impl("token_logps_bwd_", TORCH_BOX(&cpo::token_logps_bwd_));
  m.impl("token_logps_fused_", TORCH_BOX(&cpo::token_logps_fused_));
  m.impl("live_columns", TORCH_BOX(&cpo::live_columns));
  m.impl("live_grads", TORCH_BOX(&cpo::live_grads));
  m.impl("live_sum", TORCH_BOX(&cpo::live_sum));
  m.impl("sequence_sum", TORCH_BOX(&cpo::sequence_sum));
  m.impl("preference", TORCH_BOX(&cpo::preference));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of cpo_kernels", -1, nullptr};
  return PyModule_Create(&module);
}
