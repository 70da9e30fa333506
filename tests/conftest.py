"""Without a GPU Triton kernels run in its interpreter, on CPU tensors: set before anything imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
