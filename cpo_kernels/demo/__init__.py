"""`cpo-kernels demo`: the whole method on a small generated world. `world` makes questions and rates answers, `model`
makes tokenizer and model, `run` trains and evaluates."""
