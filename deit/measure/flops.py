"""FLOPs of one forward pass, by fvcore with handlers for everything that these networks compute.

The convention is that of the published tables: a multiply-add of a matrix product or convolution
counts one; additions, multiplications and the like count one for each output element, means one for
each input element, GELU 8, softmax 5, pow 5, sqrt 4, sigmoid 4; moving data counts nothing. A fused
operation counts what its parts would: fused attention its two products, the scaling and the
softmax, `addcmul` a multiplication and an addition. So the numbers do not depend on fast paths.

Networks are traced on the meta device, where tensors have shapes but no memory. fvcore is imported
only when a network is counted; `deit.measure.formula` serves where it is not installed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["PER_OUTPUT", "FlopCount", "count_flops"]

Handle = Callable[[Sequence[Any], Sequence[Any]], float]

# FLOPs for each element of the output; the operator names are those of a traced graph
PER_OUTPUT = {
    "abs": 1,
    "add": 1,
    "addcmul": 2,
    "div": 1,
    "gelu": 8,
    "mul": 1,
    "neg": 1,
    "pow": 5,
    "rsqrt": 5,
    "rsub": 1,
    "sigmoid": 4,
    "softmax": 5,
    "sqrt": 4,
    "square": 1,
    "sub": 1,
}

# for each element of the input; a variance is a mean, a difference, a square and another mean
PER_INPUT = {"mean": 1, "sum": 1, "var": 4, "var_mean": 4}

# they move data or make constants; those that fvcore ignores by itself are not repeated
MOVES = (
    "alias",
    "broadcast_tensors",
    "clone",
    "expand_as",
    "flip",
    "index_select",
    "lift_fresh",
    "movedim",
    "mT",
    "new_ones",
    "numpy_T",
    "ones_like",
    "pad",
    "repeat",
    "tensor_split",
    "unflatten",
    "view_as",
)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs in all and by operator, and the operators that had no handler, with their numbers."""

    total: float
    by_operator: Counter[str]
    uncounted: Counter[str]


def count_flops(model: nn.Module, images: Tensor) -> FlopCount:
    """Count `model(images)`; both may be on the meta device.

    Raises:
        ImportError: if fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore compiles by means that torch has deprecated
        from fvcore.nn import FlopCountAnalysis

    training = model.training
    # Tracing warns of every size that becomes a constant, which is what a count needs.
    with warnings.catch_warnings(), torch.no_grad(), _OpaqueConvolution():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model.eval(), images)
        analysis.set_op_handle(**_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_operator = analysis.by_operator()
        uncounted = analysis.unsupported_ops()
    model.train(training)
    return FlopCount(sum(by_operator.values()), by_operator, uncounted)


def _handles() -> dict[str, Handle | None]:
    handles: dict[str, Handle | None] = {f"aten::{name}": None for name in MOVES}
    for name, cost in PER_OUTPUT.items():
        for spelling in (name, name + "_"):  # and in place
            handles[f"aten::{spelling}"] = _per_output(name, cost)
    for name, cost in PER_INPUT.items():
        handles[f"aten::{name}"] = _per_input(name, cost)
    handles["aten::scaled_dot_product_attention"] = _attention
    handles["aten::baddbmm"] = _baddbmm
    handles["deit::opaque_conv2d"] = _convolution
    return handles


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _per_output(name: str, cost: int) -> Handle:
    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        # a trace contains the arithmetic on sizes too, in integers: no work on data
        on_data = outputs[0].type().scalarType() != "Long"
        return Counter({name: cost * prod(_shape(outputs[0])) * on_data})

    return handle


def _per_input(name: str, cost: int) -> Handle:
    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        return Counter({name: cost * prod(_shape(inputs[0]))})

    return handle


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """(..., N, D), (..., M, D), (..., M, E): scaling, both products and the softmax between."""
    *batch, queries, width = _shape(inputs[0])
    keys, value_width = _shape(inputs[2])[-2:]
    logits = prod(batch) * queries * keys
    return Counter(
        {
            "mul": prod(batch) * queries * width,
            "matmul": logits * (width + value_width),
            "softmax": PER_OUTPUT["softmax"] * logits,
        }
    )


def _convolution(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """(B, C, H, W) with kernels (N, C / groups, h, w), as fvcore counts it: without the bias."""
    batch, _, *size = _shape(outputs[0])
    return Counter({"conv": batch * prod(size) * prod(_shape(inputs[1]))})


def _baddbmm(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """bias + (B, N, K) (B, K, M); as for linear layers the bias comes with the multiply-adds."""
    return Counter({"matmul": prod(_shape(inputs[1])) * _shape(inputs[2])[-1]})


_LIBRARY = torch.library.Library("deit", "FRAGMENT")
_LIBRARY.define(
    "opaque_conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, int groups=1) -> Tensor"
)
_LIBRARY.impl("opaque_conv2d", torch.ops.aten.conv2d.default, "CompositeExplicitAutograd")


class _OpaqueConvolution(TorchFunctionMode):
    """Runs `conv2d` as one operator of our own.

    On the meta device torch's runs a decomposition in Python before it gets to be recorded, and
    that cannot be traced. Inside an operator nothing is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            func = torch.ops.deit.opaque_conv2d
        return func(*args, **kwargs)
