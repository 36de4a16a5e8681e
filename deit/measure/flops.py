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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PER_OUTPUT", "FlopCount", "MatMul", "count_flops"]

# FLOPs for each element of the output
PER_OUTPUT = {"abs": 1, "add": 1, "addcmul": 2, "div": 1, "gelu": 8, "mul": 1, "neg": 1, "pow": 5,
              "rsqrt": 5, "rsub": 1, "sigmoid": 4, "softmax": 5, "sqrt": 4, "square": 1,
              "sub": 1}  # fmt: skip
# for each element of the input; a variance is a mean, a difference, a square and another mean
PER_INPUT = {"adaptive_avg_pool2d": 1, "mean": 1, "sum": 1, "var": 4, "var_mean": 4}
# for each element of the input, one less without weights: the place of these among the arguments
NORMS = {"batch_norm": (2, 1), "group_norm": (5, 2), "layer_norm": (5, 2)}
# Free beside views: they move data or make constants, or fvcore leaves them out.
FREE = {"_to_copy", "arange", "cat", "clamp", "clamp_min", "clone", "constant_pad_nd", "copy",
        "detach", "dropout", "empty", "empty_like", "expand_as", "flip", "full", "full_like",
        "gather", "index", "index_select", "lift_fresh", "masked_fill", "max", "new_empty",
        "new_full", "new_ones", "new_zeros", "ones", "ones_like", "pad", "relu", "repeat", "roll",
        "scalar_tensor", "stack", "where", "zeros", "zeros_like"}  # fmt: skip


@dataclass(frozen=True)
class MatMul:
    """A matrix product or convolution of one image: multiply-adds, and elements moved.

    `moved` is read or written for each image, `weights` once a batch.
    """

    multiply_adds: int
    moved: int
    weights: int


@dataclass
class FlopCount:
    """FLOPs by operator, operators of unknown cost with their numbers, and the matrix products."""

    by_operator: Counter[str] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)
    matmuls: list[MatMul] = field(default_factory=list)

    @property
    def total(self) -> int:
        """FLOPs of the whole pass."""
        return self.by_operator.total()


def count_flops(model: nn.Module, images: Tensor) -> FlopCount:
    """Count `model(images)` in evaluation mode; both may be on the meta device.

    The matrix products are those of one image if `images` is one.
    """
    training = model.training
    counter = _Counter()
    # In inference mode operators come whole, as `linear` or `layer_norm`, and not in pieces.
    with torch.inference_mode(), counter:
        model.eval()(images)
    model.train(training)
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts every operator that is run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = FlopCount()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found, name = self.count, func.overloadpacket.__name__.rstrip("_")
        if not (name in KNOWN or func.is_view):
            with self:  # into pieces of known cost, as einsum
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if name in MATMULS:
            matmul = MATMULS[name](output, *args)
            found.matmuls.append(matmul)
            found.by_operator["matmul"] += matmul.multiply_adds
            if name == "scaled_dot_product_attention":
                found.by_operator["mul"] += args[0].numel()
                logits = args[0].numel() // args[0].shape[-1] * args[1].shape[-2]
                found.by_operator["softmax"] += PER_OUTPUT["softmax"] * logits
        elif name in PER_OUTPUT:
            # arithmetic on indices, in integers, is no work on data
            if output.is_floating_point():
                found.by_operator[name] += PER_OUTPUT[name] * output.numel()
        elif name in PER_INPUT:
            found.by_operator[name] += PER_INPUT[name] * args[0].numel()
        elif name in NORMS:
            cost, weight = NORMS[name]
            found.by_operator[name] += (cost - (args[weight] is None)) * args[0].numel()
        elif name not in FREE and not func.is_view:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if any(tensor.is_floating_point() for tensor in tensors):
                found.uncounted[f"aten::{name}"] += 1
        return output


def _dense(output: Tensor, x: Tensor, weight: Tensor, *_: Any) -> MatMul:
    """x (..., K) with a weight that has K entries for each of its outputs."""
    return MatMul(output.numel() * x.shape[-1], x.numel() + output.numel(), weight.numel())


def _batched(output: Tensor, x: Tensor, y: Tensor, *_: Any) -> MatMul:
    if y.ndim == 2:
        return _dense(output, x, y)
    return MatMul(output.numel() * x.shape[-1], x.numel() + y.numel() + output.numel(), 0)


def _added(output: Tensor, bias: Tensor, x: Tensor, y: Tensor, *_: Any) -> MatMul:
    """The bias comes with the multiply-adds."""
    return _batched(output, x, y)


def _convolution(output: Tensor, x: Tensor, weight: Tensor, *_: Any) -> MatMul:
    multiply_adds = output.numel() * prod(weight.shape[1:])
    return MatMul(multiply_adds, x.numel() + output.numel(), weight.numel())


def _attention(output: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> MatMul:
    """Both products: (..., N, D) with (..., M, D), and that with (..., M, E)."""
    multiply_adds = k.shape[-2] * (q.numel() + output.numel())
    return MatMul(multiply_adds, q.numel() + k.numel() + v.numel() + output.numel(), 0)


MATMULS: dict[str, Callable[..., MatMul]] = {
    "addmm": _added,
    "baddbmm": _added,
    "bmm": _batched,
    "conv2d": _convolution,
    "linear": _dense,
    "matmul": _batched,
    "mm": _dense,
    "scaled_dot_product_attention": _attention,
}
KNOWN = MATMULS.keys() | PER_OUTPUT.keys() | PER_INPUT.keys() | NORMS.keys() | FREE
