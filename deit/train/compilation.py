"""Compile a network in place, whole or block by block, for every command with `--compile`."""

from __future__ import annotations

import torch._dynamo
from torch import nn

from deit.train.distributed import blocks_of

# Blocks share their code, which torch compiles anew for each width, for training and evaluation,
# for frozen weights; beyond its own limit, 8, it would run them without compilation.
GRAPHS = 64


def compile_network(network: nn.Module, mode: str = "default", *, blocks: bool = False) -> None:
    """Let torch compile `network` in place: its type stays, and so do the keys of its state dict.

    Args:
        mode: of `torch.compile`.
        blocks: compile each block by itself, not the network as a whole. Equal blocks share one
            graph, so that compiling takes the time of one block; what lies around them is eager.
            In PyTorch's documentation it is regional compilation.

    Raises:
        UserError: with `blocks`, the network has none that are known.
    """
    options = {} if mode == "default" else {"mode": mode}
    if blocks:
        config = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, GRAPHS)
    for part in blocks_of(network) if blocks else [network]:
        part.compile(**options)
