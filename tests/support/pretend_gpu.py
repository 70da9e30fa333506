"""A pytest plugin, `-p tests.support.pretend_gpu`: torch says that it sees a GPU, as on machines with one."""

import torch

torch.cuda.is_available = lambda: True
