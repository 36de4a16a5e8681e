"""FLOPs of one forward pass, by the convention of the published tables, and its matrix products.

The convention is fvcore's: a multiply-add of a matrix product or convolution counts one; additions,
multiplications and the like count one for each output element, means one for each input element,
GELU 8, softmax 5, pow 5, sqrt 4, sigmoid 4; moving data counts nothing. A fused operation counts
what its parts would: fused attention its two products, the scaling and the softmax, `addcmul` a
multiplication and an addition. So the numbers do not depend on fast paths.

Networks run on the meta device, where tensors have shapes but no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# FLOPs for each element of the output
PER_OUTPUT = {"abs": 1, "add": 1, "addcmul": 2, "div": 1, "gelu": 8, "mul": 1, "neg": 1, "pow": 5,
              "rsqrt": 5, "rsub": 1, "sigmoid": 4, "softmax": 5, "sqrt": 4, "square": 1,
              "sub": 1}  # fmt: skip
# for each element of the input; a variance is a mean, a difference, a square and another mean
PER_INPUT = {"adaptive_avg_pool2d": 1, "mean": 1, "sum": 1, "var": 4, "var_mean": 4}
# for each element of the input, one less without weights: the place of these among the arguments
NORMS = {"batch_norm": (2, 1), "group_norm": (5, 2), "layer_norm": (5, 2)}
ATTENTION = "scaled_dot_product_attention"
# the places of the two operands among the arguments
MATMULS = {"addmm": (1, 2), "baddbmm": (1, 2), ATTENTION: (0, 1)} | dict.fromkeys(
    ("bmm", "conv2d", "linear", "matmul", "mm"), (0, 1)
)
# Free beside views: they move data or make constants, or fvcore leaves them out.
FREE = {"_to_copy", "arange", "cat", "clamp", "clamp_min", "clone", "constant_pad_nd", "copy",
        "detach", "dropout", "empty", "empty_like", "expand_as", "flip", "full", "full_like",
        "gather", "index", "index_select", "lift_fresh", "masked_fill", "max", "new_empty",
        "new_full", "new_ones", "new_zeros", "ones", "ones_like", "pad", "relu", "repeat", "roll",
        "scalar_tensor", "stack", "where", "zeros", "zeros_like"}  # fmt: skip
KNOWN = MATMULS.keys() | PER_OUTPUT.keys() | PER_INPUT.keys() | NORMS.keys() | FREE


@dataclass(frozen=True)
class MatMul:
    """A matrix product or convolution of one image: multiply-adds, and elements moved.

    `moved` is read or written for each image, `weights` once a batch.
    """

    multiply_adds: int
    moved: int
    weights: int


class FlopCount(TorchDispatchMode):
    """Counts every operator that is run while it is active.

    Attributes:
        by_operator: FLOPs.
        uncounted: how often operators of unknown cost were run.
        matmuls: the matrix products, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.matmuls: list[MatMul] = []

    @property
    def total(self) -> int:
        """FLOPs of the whole pass."""
        return self.by_operator.total()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        if not (name in KNOWN or func.is_view):
            with self:  # into pieces of known cost, as einsum
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if name in MATMULS:
            self._add_matmul(name, output, args)
        elif name in PER_OUTPUT:
            # arithmetic on indices, in integers, is no work on data
            if output.is_floating_point():
                self.by_operator[name] += PER_OUTPUT[name] * output.numel()
        elif name in PER_INPUT:
            self.by_operator[name] += PER_INPUT[name] * args[0].numel()
        elif name in NORMS:
            cost, weight = NORMS[name]
            self.by_operator[name] += (cost - (args[weight] is None)) * args[0].numel()
        elif name not in FREE and not func.is_view:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if any(tensor.is_floating_point() for tensor in tensors):
                self.uncounted[f"aten::{name}"] += 1
        return output

    def _add_matmul(self, name: str, output: Tensor, args: Sequence[Any]) -> None:
        x, y = (args[place] for place in MATMULS[name])
        moved, weights = x.numel() + output.numel(), y.numel()
        if name == ATTENTION:  # (..., N, D) with (..., M, D), then with (..., M, E)
            logits = x.numel() // x.shape[-1] * y.shape[-2]
            self.by_operator["mul"] += x.numel()
            self.by_operator["softmax"] += PER_OUTPUT["softmax"] * logits
            multiply_adds = y.shape[-2] * moved
            moved, weights = moved + y.numel() + args[2].numel(), 0
        else:
            summands = prod(y.shape[1:]) if name == "conv2d" else x.shape[-1]
            multiply_adds = output.numel() * summands
            if y.ndim > 2 and name != "conv2d":  # another one for each image
                moved, weights = moved + y.numel(), 0
        self.by_operator["matmul"] += multiply_adds
        self.matmuls.append(MatMul(multiply_adds, moved, weights))


def count_flops(model: nn.Module, images: Tensor) -> FlopCount:
    """Count `model(images)` in evaluation mode; both may be on the meta device.

    The matrix products are those of one image if `images` is one.
    """
    training = model.training
    # In inference mode operators come whole, as `linear` or `layer_norm`, and not in pieces.
    with torch.inference_mode(), FlopCount() as count:
        model.eval()(images)
    model.train(training)
    return count
