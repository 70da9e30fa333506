"""Without a GPU Triton kernels run in its interpreter, on CPU tensors: set before anything imports them."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("shared machines", deadline=None)  # where 200 ms of an example may be somebody else's
settings.load_profile("shared machines")
