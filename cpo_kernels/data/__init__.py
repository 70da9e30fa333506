"""Sources to batches: `rows`, `layouts` and `schemas`, `records`, `conditions`, `template`, `packing`."""
