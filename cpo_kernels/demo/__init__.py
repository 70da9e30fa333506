"""`cpo-kernels demo`: the whole method on a small generated world. `world` makes the questions and rates the answers,
`model` makes tokenizer and model, `run` trains and judges."""
