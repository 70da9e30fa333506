"""The trainer: `loop.train` with `models`, `reference`, `checkpoints`. All keys of a recipe are in `recipe.keys`."""

from cpo_kernels.extras import need

need(__name__, "transformers", "accelerate", "safetensors", "yaml", "tqdm", "numpy")
