"""`cpo-kernels play`: `page.html` has a slider per objective, `server` generates as they move, `run` is the command."""
