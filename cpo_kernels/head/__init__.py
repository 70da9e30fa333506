"""The head: log-probs and gradients from hidden states, a chunk of logits at a time."""
