"""Train one stage described by a YAML recipe: cpsft, cdpo, sft or dpo.

cpo-kernels train recipes/truthfulqa_cpsft.yaml --data.train ratings.jsonl --run_dir runs/cpsft
cpo-kernels train recipes/truthfulqa_cdpo.yaml --model runs/cpsft/model --data.train ratings.jsonl --run_dir runs/cdpo
cpo-kernels train --keys
"""

from __future__ import annotations

from cpo_kernels.recipe.arguments import RecipeParser


def parser() -> RecipeParser:
    made = RecipeParser("cpo-kernels train", __doc__ or "")
    made.add_argument("--resume", action="store_true", help="same as --training.resume true")
    made.add_argument("--overwrite", action="store_true", help="same as --training.overwrite true")
    made.add_argument("--keys", action="store_true", help="list every key with its default and exit")
    return made
