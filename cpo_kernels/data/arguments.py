"""Prepare the data of a recipe, print its statistics and show examples as the model sees them. Trains nothing.

cpo-kernels data recipes/truthfulqa_cpsft.yaml --data.train ratings.jsonl --preview 3
cpo-kernels data recipes/official_cdpo.yaml --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/official_data
"""

from __future__ import annotations

from pathlib import Path

from cpo_kernels.recipe.arguments import RecipeParser


def parser() -> RecipeParser:
    made = RecipeParser("cpo-kernels data", __doc__ or "")
    made.add_argument("--preview", type=int, default=2, metavar="N", help="examples to show (default 2)")
    made.add_argument("--out", type=Path, help="folder for statistics.json and examples.jsonl")
    return made
