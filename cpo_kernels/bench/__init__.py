"""`cpo-kernels bench`: the head, the kernels and the training step against naive PyTorch and the baselines."""
