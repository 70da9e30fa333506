"""The trainer: `models`, `reference`, `checkpoints`, and `loop.train`; every key of a recipe is in `recipe.keys`."""

from cpo_kernels.extras import need

need(__name__, "transformers", "accelerate", "safetensors", "yaml", "tqdm", "numpy")
