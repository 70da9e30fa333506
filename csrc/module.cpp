// cpo_kernels._C: loading it registers the CPU kernels. The schemas are defined by cpo_kernels/library.py.
#include <Python.h>

#include "common.h"

STABLE_TORCH_LIBRARY_IMPL(cpo_kernels, CPU, m) {
  m.impl("token_logps_fwd", TORCH_BOX(&cpo::token_logps_fwd));
  m.impl("token_logps_bwd_", TORCH_BOX(&cpo::token_logps_bwd_));
  m.impl("token_logps_fused_", TORCH_BOX(&cpo::token_logps_fused_));
  m.impl("live_columns", TORCH_BOX(&cpo::live_columns));
  m.impl("list_live_columns", TORCH_BOX(&cpo::list_live_columns));
  m.impl("live_grads", TORCH_BOX(&cpo::live_grads));
  m.impl("live_grads_", TORCH_BOX(&cpo::live_grads_));
  m.impl("live_sum", TORCH_BOX(&cpo::live_sum));
  m.impl("logits_", TORCH_BOX(&cpo::logits_));
  m.impl("relative_anchors", TORCH_BOX(&cpo::relative_anchors));
  m.impl("linear_token_logps_fwd", TORCH_BOX(&cpo::linear_token_logps_fwd));
  m.impl("add_product_", TORCH_BOX(&cpo::add_product_));
  m.impl("live_sums_", TORCH_BOX(&cpo::live_sums_));
  m.impl("live_sums_of_logits_", TORCH_BOX(&cpo::live_sums_of_logits_));
  m.impl("live_dw", TORCH_BOX(&cpo::live_dw));
  m.impl("sequence_sum", TORCH_BOX(&cpo::sequence_sum));
  m.impl("preference", TORCH_BOX(&cpo::preference));
}

template <bool (*found)()>
static PyObject* answer(PyObject*, PyObject*) {
  try {
    return PyBool_FromLong(found());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

static PyObject* prefer_huge_pages(PyObject*, PyObject* args) {
  Py_ssize_t address = 0, bytes = 0, bytes_of_block = 0;
  if (!PyArg_ParseTuple(args, "nnn", &address, &bytes, &bytes_of_block)) return nullptr;
  cpo::prefer_huge_pages(reinterpret_cast<void*>(address), bytes, bytes_of_block);
  Py_RETURN_NONE;
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {{"has_bf16_matmuls", answer<cpo::has_bf16_matmuls>, METH_NOARGS, nullptr},
                                  {"prefer_huge_pages", prefer_huge_pages, METH_VARARGS, nullptr},
                                  {"has_tiles", answer<cpo::has_tiles>, METH_NOARGS, nullptr},
                                  {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of cpo_kernels", -1, methods};
  return PyModule_Create(&module);
}
