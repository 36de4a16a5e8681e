"""What the Triton kernels take, read from machine code: registers, memory, widths of loads.

    python benchmarks/kernel_resources.py [--target 90 80] [--dtype bf16 fp32] [--kernel linear]

Compiles every tile size as it would be launched for a layer of a base network and prints registers
a thread, bytes of stack a thread (registers that were spilled to memory), bytes of shared
memory a program, the instruction that multiplies (HGMMA and HMMA are those of tensor cores), and
how many of the loads from global memory are 16 bytes wide. No GPU is needed; Triton 3.3 is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from re import findall, search
from typing import Any, NamedTuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deit.kernels import depthwise_triton, gelu_triton, layer_norm_triton, linear_launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS, WIDTH, HIDDEN, HALF_HEAD = 64 * 197, 384, 1536, 32  # per irrep, of the base network
MAPS = (64, 14, 14, 2 * WIDTH)  # of the convolutional base network


class Row(NamedTuple):
    kernel: str
    config: str
    dtype: str
    target: str
    registers: int
    stack: int
    shared: int
    product: str
    loads: int
    wide_loads: int


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.options = dict(num_warps=num_warps, num_stages=num_stages)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Any, str, Callable, tuple]]:
    """(kernel, its module, its name there, launcher, arguments) for tensors without memory."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, hidden, qkv = tensor(ROWS, 2 * WIDTH), tensor(ROWS, 2 * HIDDEN), tensor(ROWS, 6 * WIDTH)
    up, bias = tensor(HIDDEN, WIDTH), tensor(HIDDEN)
    launch = linear_launch
    name = "linear_kernel"
    yield "linear", launch, name, launch.linear, (x, up, up, bias, WIDTH, HIDDEN)
    yield "linear interleaved", launch, name, launch.linear, (x, up, up, bias, 32, 32)
    down = (hidden, up.t(), up.t(), None, HIDDEN, WIDTH)
    yield "linear transposed", launch, name, launch.linear, down
    for act in ("gelu", "quick_gelu"):
        args = (x, up, up, bias, WIDTH, act, True)
        yield f"linear {act}", launch, "linear_act_kernel", launch.linear_act, args
    args = (qkv, x, WIDTH, HALF_HEAD, True)
    yield "weight gradient", launch, "weight_grad_kernel", launch.weight_grad, args
    yield "gelu", gelu_triton, "gelu_kernel", gelu_triton.gelu, (hidden, "gelu")
    args = (hidden, hidden, "gelu")
    yield "gelu backward", gelu_triton, "gelu_backward_kernel", gelu_triton.gelu_backward, args
    norm, vector = layer_norm_triton, torch.empty(2 * WIDTH, device="meta")
    args = (x, vector, vector, 1e-6, dtype)
    yield "layer norm", norm, "forward_kernel", norm.forward, args
    args = (x, x, vector, torch.empty(3, ROWS, device="meta"), 1e-6)
    yield "layer norm backward", norm, "backward_kernel", norm.backward, args
    maps, taps = tensor(*MAPS), torch.empty(7, 4, 2 * WIDTH, device="meta")
    conv, name = depthwise_triton, "convolve_kernel"
    yield "depthwise", conv, name, conv.convolve, (maps, taps, vector, dtype)
    backward = partial(conv.convolve, backward=True)
    yield "depthwise backward", conv, name, backward, (maps, taps, None, dtype)
    args = (maps, maps, conv.KERNEL_SIZE)
    yield "depthwise taps", conv, "taps_gradient_kernel", conv.taps_gradient, args


def configs(kernel: str, dtype: torch.dtype) -> tuple:
    """The tile sizes that are tried for a kernel."""
    if kernel.startswith("depthwise"):
        return tuple(dict.fromkeys((*depthwise_triton.WIDE, *depthwise_triton.NARROW)))
    if kernel.startswith("layer norm"):
        backward = kernel.endswith("backward")
        return getattr(layer_norm_triton, ("BACKWARD" if backward else "FORWARD") + "_CONFIGS")
    if kernel.startswith("gelu"):
        return gelu_triton.TILES
    kind = "WEIGHT_GRAD" if "weight" in kernel else "ACT" if "gelu" in kernel else "LINEAR"
    return getattr(linear_launch, kind + ("_FLOAT32" if dtype == torch.float32 else ""))


def compiled(kernel: Any, record: Recorder, capability: int) -> Any:
    """`kernel` compiled as Triton specialises it for the recorded launch."""
    types = {t: name for name, t in DTYPES.items()}
    values = dict(zip(kernel.arg_names, record.args, strict=False)) | record.kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        tensor = isinstance(value, torch.Tensor)
        one = not tensor and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            signature[name], constants[name] = "constexpr", value
            continue
        if tensor:
            signature[name] = "*" + types[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        whole = isinstance(value, int) and value % 16 == 0
        if tensor or (whole and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=record.options)


def measure(kernel: Any) -> tuple[int, int, int, str, int, int]:
    """Registers, stack, shared memory, product, loads and wide loads of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def run(tool: str, option: str) -> str:
            command = [TOOLS / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "-c")
    registers, stack = (int(search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    products = Counter(findall(r"\b(HGMMA|HMMA|FFMA)\b", code)).keys()
    product = next((p for p in ("HGMMA", "HMMA", "FFMA") if p in products), "none")
    loads = findall(r"\b(?:LDG|LDGSTS)\.(\S+)", code)
    wide = sum("128" in load.split(".") for load in loads)
    return registers, stack, kernel.metadata.shared, product, len(loads), wide


def table(targets: list[int], dtypes: list[str], kernels: str = "") -> Iterator[Row]:
    """A row for each tile size of the kernels whose names contain `kernels`."""
    for target in targets:
        for dtype in dtypes:
            for name, module, attribute, launch, args in launches(DTYPES[dtype]):
                for config in configs(name, DTYPES[dtype]) if kernels in name else ():
                    kernel, record = getattr(module, attribute), Recorder()
                    setattr(module, attribute, record)
                    try:
                        launch(*args, config)
                    finally:
                        setattr(module, attribute, kernel)
                    numbers = measure(compiled(kernel, record, target))
                    yield Row(name, "x".join(map(str, config)), dtype, f"sm_{target}", *numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, nargs="+", default=[90, 80], help="capability")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    args = parser.parse_args()
    layout = "{:20} {:15} {:5} {:6} {:>9} {:>5} {:>6} {:7} {:>5} {:>10}"
    print(layout.format(*Row._fields))
    for row in table(args.target, args.dtype, args.kernel):
        print(layout.format(*row), flush=True)


if __name__ == "__main__":
    main()
