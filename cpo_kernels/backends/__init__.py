"""The backends, the choice among them, and kernels for a vocabulary that is sharded over ranks."""
