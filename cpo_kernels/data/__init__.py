"""Sources to batches: `rows`, `layouts` and `schemas`, `records`, `conditions`, `template`, `packing`."""

from cpo_kernels.extras import need

need(__name__, "tqdm")
