"""Fused paths of the layers, each with a plain twin in `deit.layers`.

They are chosen by themselves where they apply, by device, dtype and shape. The option `--kernels
plain` of the commands, the environment variable `DEIT_KERNELS=plain`, `set_mode("plain")` and the
context manager `plain()` switch all of them off.
"""

from deit.kernels.choice import ENVIRONMENT, MODES, get_mode, plain, set_mode

__all__ = ["ENVIRONMENT", "MODES", "get_mode", "plain", "set_mode"]
