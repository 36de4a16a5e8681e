"""How to check: in which arithmetic, with how many images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from deit.equivariance import tolerance_of
from deit.train.compilation import compile_network
from deit.train.engine import lower_precision

__all__ = ["DTYPES", "Settings"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """Of one check.

    Attributes:
        dtype: of parameters and images.
        count: natural images, and random ones.
        amp: automatic mixed precision; parameters and images are float32 then.
        compile_mode: check what `torch.compile` makes in this mode too; None for not.
        compile_blocks: compile each block of a network by itself.
    """

    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a device is immutable
    count: int = 2
    seed: int = 0
    amp: bool = False
    compile_mode: str | None = None
    compile_blocks: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """What features are rounded to."""
        return lower_precision(self.device) if self.amp else self.dtype

    @property
    def arithmetic(self) -> str:
        """For tables."""
        name = str(self.compute_dtype).removeprefix("torch.")
        return f"amp {name}" if self.amp else name

    def tolerance(self, depth: int = 1) -> float:
        """For layers, or for networks of `depth` blocks."""
        return tolerance_of(self.compute_dtype, depth)

    def autocast(self) -> AbstractContextManager:
        """To be entered around a forward pass."""
        if not self.amp:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A module or function, compiled if that is asked for.

        Blocks of a network, and of a method's network, are compiled in place.
        """
        if self.compile_mode is None:
            return function
        # each case is a new network: without this, recompilations stop at a limit, silently
        torch.compiler.reset()
        network = getattr(function, "__self__", function)
        if self.compile_blocks and (hasattr(network, "blocks") or hasattr(network, "stages")):
            compile_network(network, self.compile_mode, blocks=True)
            return functools.partial(function)
        return torch.compile(function, mode=self.compile_mode)
