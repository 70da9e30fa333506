"""Every kernel on the user's device against the float64 oracle: `python -m cpo_kernels.check.run`."""
