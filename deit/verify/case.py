"""What to check, and how: a layer or a network, in which arithmetic, with how many images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from deit.equivariance import Feature, tolerance_of
from deit.groups import FLOP, Group
from deit.train.engine import lower_precision
from deit.verify import samples

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How to check.

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
        return torch.autocast(self.device.type, self.compute_dtype) if self.amp else nullcontext()


@dataclass(frozen=True, eq=False)
class Case:
    """A layer or a network to check.

    Attributes:
        name, variant: for the table.
        build: makes the module, with any parameters.
        build_twin: makes the ordinary module of the same job, which the same check must refuse: a
            function of the input's parts, and if there are several of the output's, side by side
            on the last axis.
        size: height and width of the input.
        form: of the input. "image" is one of three colours, "maps" are parts (B, H, W, C/2),
            "tokens" parts (B, N, C/2) of a grid of this size.
        is_network: its gradients are compared with more tolerance, on one natural and one random
            sample, so that a large network's activations fit, and not in 16-bit arithmetic.
    """

    name: str
    variant: str
    build: Callable[[], nn.Module]
    build_twin: Callable[[], nn.Module]
    size: tuple[int, int]
    form: str = "image"
    group: Group = FLOP
    is_network: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def inputs(self, count: int, seed: int) -> Feature:
        """`count` natural samples, then as many random ones; float64, on the CPU."""
        if self.form == "image":
            return samples.images(count, self.size, seed)
        x = samples.features(count, self.size, seed)
        rep = self.group.regular(samples.WIDTH)
        return tuple(rep.split(x if self.form == "maps" else x.flatten(1, 2)))
