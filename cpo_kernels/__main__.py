"""`python -m cpo_kernels` is `cpo-kernels`."""

from cpo_kernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
