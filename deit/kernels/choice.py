"""Whether a fused path may be taken: one switch for all of them, and what they need in common.

Fused paths compute what the plain formulas do, and are chosen by device, dtype and shape. They are
off where something other than numbers flows through the layers: while a graph is exported or traced
for other programs, under function transforms, and for tensors of other kinds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deit.errors import UserError

__all__ = [
    "ENVIRONMENT",
    "MODES",
    "get_mode",
    "is_being_compiled",
    "is_plain_tensor",
    "plain",
    "set_mode",
]

MODES = ("auto", "plain")
ENVIRONMENT = "DEIT_KERNELS"


# Read once, here: compiled code depends on it, and would be compiled anew after a later change.
_mode = os.environ.get(ENVIRONMENT) or "auto"


def get_mode() -> str:
    """`auto`, fused paths where they apply, or `plain`, none.

    Raises:
        UserError: if nothing was set and the environment variable DEIT_KERNELS is neither.
    """
    if _mode not in MODES:
        raise UserError(_wrong(f"the environment variable {ENVIRONMENT}", _mode))
    return _mode


def _wrong(source: str, mode: str) -> str:
    return f"{source} is {mode!r}: use one of {', '.join(MODES)}"


def set_mode(mode: str) -> None:
    """Choose for the whole process; before it, the environment variable DEIT_KERNELS decides.

    Raises:
        UserError: for anything but `auto` and `plain`.
    """
    global _mode
    if mode not in MODES:
        raise UserError(_wrong("the mode of the kernels", mode))
    _mode = mode


# Set while exporting and not while compiling. `torch.compiler.is_exporting` would be the same, but
# torch's compiler up to 2.11 at least takes it for `is_compiling`.
if hasattr(torch.compiler, "_is_exporting_flag"):

    def _is_exporting() -> bool:
        return torch.compiler._is_exporting_flag

else:  # torch 2.6

    @torch.compiler.assume_constant_result
    def _is_strict_export() -> bool:
        # of what such an export sets, this is what hardly anybody else does
        return torch._dynamo.config.allow_rnn

    def _is_exporting() -> bool:
        return torch.compiler._is_compiling_flag or _is_strict_export()


@contextmanager
def plain() -> Iterator[None]:
    """The plain formulas inside a `with` block, for comparisons."""
    before = get_mode()
    set_mode("plain")
    try:
        yield
    finally:
        set_mode(before)


def is_plain_tensor(x: object) -> bool:
    """Whether `x` holds the numbers themselves, and fused paths are switched on.

    False for the stand-ins of symbolic tracers, for tensor subclasses, inside `torch.export`,
    TorchScript's tracing and functorch's transforms, and in forward-mode differentiation.
    """
    if get_mode() == "plain" or type(x) not in (Tensor, nn.Parameter):
        return False
    if torch.compiler.is_compiling():
        return not _is_exporting()
    return not (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_being_compiled() -> bool:
    """Whether `torch.compile` is looking, to run the result, and fused paths are switched on."""
    return get_mode() == "auto" and torch.compiler.is_compiling() and not _is_exporting()
