"""Mirror-equivariant vision networks (arXiv:2502.05169): layers, models, training, measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(source: str | Path, *, ema: bool = False, **kwargs: Any) -> nn.Module:
    """The trained network of a checkpoint, built as it was trained (`deit.train.loading.load`).

    `load("best_checkpoint.pth")` takes the trained weights, `ema=True` their average. `img_size`
    and `num_classes` adapt it, `model` names the network where the file does not.
    """
    from deit.train import loading  # which loads torch: not for those who want the version only

    return loading.load(source, ema=ema, **kwargs)
