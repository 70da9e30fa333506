"""The ops over logits, token and sequence log-probs, with autograd."""
