"""Which kernels run: the backends and the choice among them, and a vocabulary that is sharded over ranks."""
