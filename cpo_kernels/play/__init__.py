"""`cpo-kernels play`: `page.html` has a slider per objective, `server` answers as they move, `run` is the command."""
