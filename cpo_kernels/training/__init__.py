"""The trainer: `config` (every key with its help), `models`, `reference`, `checkpoints`, and `loop.train`."""

from cpo_kernels.extras import need

need(__name__, "transformers", "accelerate", "safetensors", "yaml", "tqdm", "numpy")
