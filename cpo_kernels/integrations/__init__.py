"""Thin adapters to other packages; each module imports its package, the core imports none of them."""
