"""The options of `calculate_complexity.py`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import torch
from timm.layers import to_2tuple

from deit.cli import (
    CommandLine,
    OptionGroup,
    add_compile,
    add_kernels,
    key_value,
    number,
    output_file,
)
from deit.errors import UserError
from deit.measure.measure import DEFAULT_BATCH
from deit.measure.networks import SYMMETRIZED, select
from deit.measure.plot import FORMATS
from deit.train.build import model_arguments
from deit.train.distributed import choose_device
from deit.train.engine import lower_precision
from deit.train.loading import build_as_trained
from deit.train.options import device_name

DESCRIPTION = """Parameters, FLOPs, throughput and memory of equivariant networks and their twins.

  python calculate_complexity.py --amp --compile              # published networks, timed
  python calculate_complexity.py --no-throughput              # seconds, on any machine
  python calculate_complexity.py --models 'd2_deit_base*' --train --json out.json"""

DTYPES = ("float32", "bfloat16", "float16", "float64")


# fmt: off
def _parser() -> CommandLine:
    parser = CommandLine(prog="calculate_complexity.py", description=DESCRIPTION)
    what = OptionGroup(parser, "what to measure")
    what.add("--models", str, None, "NAME",
             "names or globs (default: the published ones; to be timed on a CPU, the small ones)",
             nargs="+")
    what.add("--checkpoint", str, None, "FILE",
             "the network in it, as it was trained, and its twin with what both know of its "
             "arguments")
    what.add("--model-kwargs", key_value, None, "KEY=VALUE",
             "arguments of the networks, in place of those in --checkpoint; a network that does "
             "not know one goes without it", nargs="+")
    what.add("--img-size", number(int, 1), None, "N", "image size; each network's own without")
    what.switch("--symmetrized-asym-feats",
                "classify with the absolute values of antisymmetric features too, where there are "
                "any")
    what.switch("--fold", "time the folded form of each equivariant network beside it")
    what.switch("--throughput", "measure throughput and memory", default=True)
    what.switch("--train", "measure training steps too: forward, backward, AdamW")
    what.switch("--profile", "show where the time of each network goes")
    how = OptionGroup(parser, "how to run")
    how.add("--device", device_name, "auto", "NAME", "auto, cpu, cuda, cuda:N or mps")
    how.add("--dtype", str, None, "NAME",
            f"{', '.join(DTYPES)} (default: float32, with --amp bfloat16)", choices=DTYPES)
    how.switch("--amp", "keep weights in float32 and let autocast choose --dtype where it may")
    add_compile(how, "compile the networks with torch.compile")
    how.add("--batch-size", number(int, 1), None, "N",
            f"images a step (default: {DEFAULT_BATCH}, on a CPU fewer if that takes long); "
            "reduced where memory does not hold it")
    how.add("--min-time", number(float, 0), 1.0, "S", "seconds of measurement for each network")
    how.add("--threads", number(int, 1), None, "N", "threads of a CPU; torch's choice without")
    add_kernels(how)
    out = OptionGroup(parser, "what to write")
    out.add("--json", output_file(), None, "FILE", "settings and results")
    out.add("--csv", output_file(), None, "FILE", "the results, a line for each network")
    out.add("--plot", output_file(*FORMATS), None, "FILE",
            "throughput gain and published accuracy over FLOPs")
    return parser
# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The options, the same for all networks that are compared.

    `device` is a torch.device, `dtype` that of the arithmetic, and `storage` that of weights and
    images: with `amp` these are float32, and autocast casts. `arguments` are those of the
    networks, where they know them.

    Raises:
        UserError: a wrong option or value.
    """
    args = _parser().parse_args(argv)
    if args.amp and args.dtype in ("float32", "float64"):
        raise UserError(f"--amp with --dtype {args.dtype}: autocast goes to bfloat16 or float16")
    if args.fold and args.train:
        raise UserError("--fold with --train: a folded network is not trained; drop one")
    for wanted in ("train", "profile", "fold"):
        if getattr(args, wanted) and not args.throughput:
            raise UserError(f"--{wanted} measures times, which --no-throughput forbids: drop one")
    files = [path.resolve() for path in (args.json, args.csv, args.plot) if path]
    if len(set(files)) < len(files):
        raise UserError("two of --json, --csv and --plot are one file: give each its own")
    if args.checkpoint and args.models:
        args.models = select(args.models)
        if (count := len(args.models)) > 1:
            raise UserError(f"--checkpoint holds one network, not {count}: give its exact name")
    args.arguments = dict(args.model_kwargs or ())
    if args.checkpoint:
        _take_checkpoint(args)
    if args.symmetrized_asym_feats:
        args.arguments[SYMMETRIZED] = True
    args.device = choose_device(args.device)
    default = lower_precision(args.device) if args.amp else torch.float32
    args.dtype = getattr(torch, args.dtype) if args.dtype else default
    args.storage = torch.float32 if args.amp else args.dtype
    return args


def _take_checkpoint(args: Namespace) -> None:
    """Set the model, its arguments and the size of its images as --checkpoint has them."""
    network, options = build_as_trained(
        args.checkpoint,
        model=args.models[0] if args.models else None,
        img_size=args.img_size,
        kwargs=args.arguments,
    )
    args.arguments = model_arguments(options, network.num_classes)
    size = args.arguments.pop("img_size")
    if isinstance(size, tuple) and size[0] != size[1]:
        raise UserError(
            f"--checkpoint {args.checkpoint} is for images of {size[0]} x {size[1]} pixels: "
            "give --img-size for square ones"
        )
    args.models, args.img_size = [options.model], to_2tuple(size)[0]
