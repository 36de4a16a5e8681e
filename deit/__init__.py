"""Mirror-equivariant vision networks (arXiv:2502.05169): layers, models, training, measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deit.train.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'deit' has no attribute {name!r}")
    from deit.train.loading import load  # which loads torch: not for those who want the version

    return load
