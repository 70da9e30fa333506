"""Does the model follow its conditions? `controllability` evaluates scored generations, `likelihood` and `greedy`
compare with human-rated answers, `run` is `cpo-kernels eval`."""
