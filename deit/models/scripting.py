"""TorchScript for networks whose layers it cannot read."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.fx import GraphModule, symbolic_trace

__all__ = ["Scriptable"]


class Scriptable:
    """A network that `torch.jit.script` compiles from its traced graph.

    TorchScript reads a layer's source, and knows neither groups nor representations. They are all
    decided when a network is made, so symbolic tracing leaves plain tensor operations.
    """

    def __prepare_scriptable__(self) -> GraphModule:
        """torch's hook: what to script in place of this network, in the mode that it is in."""
        return symbolic_trace(cast(nn.Module, self))
