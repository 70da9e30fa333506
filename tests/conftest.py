"""Triton kernels run in its interpreter, on CPU tensors; where there is a GPU `cpo-kernels check` runs them on it.

Set before anything imports them.
"""

import os

from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("shared machines", deadline=None)  # where 200 ms of an example may be somebody else's
settings.load_profile("shared machines")
