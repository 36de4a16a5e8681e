"""Relative errors of logits and of all gradients on a device, against float64 on the CPU.

    python benchmarks/exactness.py --device cuda --json errors.json

In float32, and in bfloat16 by autocast, of one network of each family and of its ordinary twin.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from deit.cli import CommandLine, OptionGroup, key_value, number, output_file
from deit.equivariance import randomize_
from deit.errors import one_line_errors
from deit.measure.networks import build, comparisons
from deit.saving import write_text

MODELS = ("d2_deit_small_patch16_LS", "hybrid_deit_small_patch16_LS",
          "d2_inv_early_deit_small_patch16_LS", "resmlp_equi_d2_12",
          "d2_convnext_isotropic_small", "d2_convnext_tiny")  # fmt: skip


def errors(name: str, args: Namespace) -> dict[str, dict[str, float]]:
    """Of `logits` and `gradients` by precision, each ||found - exact|| / ||exact||."""
    torch.manual_seed(0)
    model, size = build(name, args.img_size, dict(args.model_kwargs or ()))
    images = torch.randn(args.batch_size, 3, size, size, dtype=torch.float64)
    model = randomize_(model.double())

    def run(device: str, dtype: torch.dtype, amp: bool) -> list[torch.Tensor]:
        model.to(device, dtype).zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits = model(images.to(device, dtype))
        logits.double().square().mean().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [t.detach().double().cpu() for t in (logits, torch.cat(gradients))]

    exact = run("cpu", torch.float64, False)
    rows = {}
    for precision, amp in (("float32", False), ("bfloat16", True)):
        found = run(args.device, torch.float32, amp)
        pairs = zip(("logits", "gradients"), found, exact, strict=True)
        rows[precision] = {what: float((f - e).norm() / e.norm()) for what, f, e in pairs}
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine(description=__doc__.splitlines()[0])
    group = OptionGroup(parser, "benchmark")
    group.add("--models", str, list(MODELS), "NAME", "equivariant networks", nargs="+")
    group.add("--model-kwargs", key_value, None, "KEY=VALUE", "of the networks", nargs="+")
    group.add("--img-size", number(int, 1), None, "N", "image size; each network's own without")
    group.add("--batch-size", number(int, 1), 4, "N", "images")
    group.add("--device", str, "cuda", "NAME", "cuda or cpu", choices=("cuda", "cpu"))
    group.add("--json", output_file(), None, "FILE", "the errors")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    found = {}
    for name in (name for members in comparisons(args.models) for name in members):
        found[name] = errors(name, args)
        print(name, found[name], flush=True)
        if args.json is not None:
            write_text(args.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
