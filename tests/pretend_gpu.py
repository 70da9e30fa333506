"""A pytest plugin, `-p tests.pretend_gpu`: torch says that it sees a GPU, as on the machines of those who have one."""

import torch

torch.cuda.is_available = lambda: True
