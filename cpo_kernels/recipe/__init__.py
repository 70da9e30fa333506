"""Every key of a recipe, read and checked once: `config.read_config`, `keys`."""

from cpo_kernels.extras import need

need(__name__, "yaml")
