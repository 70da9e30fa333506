"""Does the model follow its conditions? `controllability` judges generated text by a program, `likelihood` and `greedy`
judge by human-rated answers, `run` is `cpo-kernels eval`."""
