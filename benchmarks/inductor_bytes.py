"""Operations and bytes of one block of each family, as TorchInductor would run it on a GPU.

    python benchmarks/inductor_bytes.py [--batch-size 64] [--width 768]

No GPU is needed: a block is traced with tensors that hold no data, under bfloat16 autocast, its
graphs are lowered and fused for an H100, and no code is generated. Bytes are what all operations
read and write; what stays in a cache between two of them counts all the same. Attention is one
operation that reads q, k, v and writes its output, as flash attention does.

It calls TorchInductor's own functions, which change between versions: see `SUPPORTED`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.node import map_aggregate

from deit import layers as L
from deit.cli import CommandLine, OptionGroup, number
from deit.errors import one_line_errors
from deit.groups import FLOP

SUPPORTED = torch.__version__ >= "2.14"  # the versions that it has been run with
H100 = dict(
    cc=90, major=9, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """Operations that are launched, and the bytes that they read and write."""

    nodes: int
    bytes: int


Build = Callable[[], nn.Module]


def blocks(batch: int = 64, width: int = 768) -> dict[str, tuple[Build, Build, tuple[int, ...]]]:
    """A block of each family, its ordinary twin, and the shape of the twin's features."""
    vit = dict(dim=width, num_heads=width // 64, use_fused_attn=True)
    mixer = (FLOP.regular(width), L.MirrorGrid(14, 14).rep)
    return {
        "ViT": (partial(L.Block, **vit), partial(L.OrdinaryBlock, **vit), (batch, 197, width)),
        "ResMLP": (partial(L.MixerBlock, *mixer), partial(L.OrdinaryMixerBlock, width, 196),
                   (batch, 196, width)),
        "ConvNeXt": (partial(L.ConvBlock, width), partial(L.OrdinaryConvBlock, width),
                     (batch, 14, 14, width)),
    }  # fmt: skip


def count(build: Build, shape: Sequence[int], *, parts: bool, training: bool) -> list[Count]:
    """What a compiled block does: forward, and in training backward.

    Args:
        shape: of its features, (batch, ..., channels); with `parts` it takes two halves of them.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    found: list[Count] = []

    def lower(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable:
        found.append(_lowered(graph, inputs, options))
        return make_boxed_func(graph.forward)  # run as it was traced, on tensors without data

    shapes = 2 * [(*shape[:-1], shape[-1] // 2)] if parts else [shape]
    with FakeTensorMode(allow_non_fake_inputs=True):
        block = build().train(training).requires_grad_(training)
        inputs = [torch.empty(each, requires_grad=training) for each in shapes]
        compiled = torch.compile(block, backend=partial(compile_fx, inner_compile=lower))
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            outputs = compiled(tuple(inputs) if parts else inputs[0])
            if training:
                outputs = outputs if parts else [outputs]
                torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    torch.compiler.reset()
    return found


def _lowered(graph: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Count:
    """Lower and fuse a graph that was traced on the CPU, as one on an H100."""
    from torch._inductor import compile_fx as fx
    from torch._inductor import scheduler
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V

    fake = torch._guards.detect_fake_mode(inputs)
    graph, device = copy.deepcopy(graph), torch.device("cuda", 0)

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
    graph.recompile()
    direction = {key: options.get(key, False) for key in ("is_inference", "is_backward")}
    properties = DeviceProperties(type="cuda", index=0, **H100)
    with (  # TorchInductor's questions about the device are answered as an H100 would
        mock.patch.object(scheduler, "has_triton", return_value=True),
        mock.patch.object(DeviceProperties, "create", return_value=properties),
        V.set_fake_mode(fake),
        DebugContext(),
    ):
        with fake:
            inputs = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
                if isinstance(x, Tensor) else x
                for x in inputs
            ]  # fmt: skip
        fx.record_original_output_strides(graph)
        fx.view_to_reshape(graph)
        fx.FakeTensorProp(graph, mode=fake).propagate(*inputs)
        fx._recursive_post_grad_passes(graph, is_inference=direction["is_inference"])
        lowering = GraphLowering(graph, example_inputs=inputs, **direction)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering._update_scheduler()
            nodes = lowering.scheduler.nodes
            return Count(len(nodes), sum(node.get_read_write_buffers_sizes() for node in nodes))


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine(description=__doc__.splitlines()[0])
    group = OptionGroup(parser, "block")
    group.add("--batch-size", number(int, 1), 64, "N", "images")
    group.add("--width", number(int, 64), 768, "C", "channels, a multiple of 64")
    args = parser.parse_args(argv)
    if args.width % 64:
        parser.error(f"--width {args.width} is no multiple of 64, the width of a head")
    print(f"torch {torch.__version__}, batch {args.batch_size}, width {args.width}, bfloat16")
    print(f"{'block':10} {'':22} {'operations':>10} {'MB':>7} {'twin':>10} {'MB':>7} {'ratio':>6}")
    for name, (ours, twin, shape) in blocks(args.batch_size, args.width).items():
        for training in (False, True):
            own = count(ours, shape, parts=True, training=training)
            other = count(twin, shape, parts=False, training=training)
            for what, a, b in zip(("forward", "backward"), own, other, strict=False):
                title = f"training, {what}" if training else "inference"
                print(
                    f"{name:10} {title:22} {a.nodes:10} {a.bytes / 1e6:7.0f} "
                    f"{b.nodes:10} {b.bytes / 1e6:7.0f} {a.bytes / b.bytes:6.3f}", flush=True,
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
