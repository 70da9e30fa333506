"""From JSONL to batches: `records`, `sources` (field maps), `conditions` (samplers), `template`, `packing`."""
