"""The trainer: `config` (every key with its help), `models`, `reference`, `checkpoints`, and `loop.train`."""
