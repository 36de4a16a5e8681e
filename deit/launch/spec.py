"""From a command line to a `JobSpec`: what to run, on what, where.

Precedence, option by option: command line, recipe, the user's cluster file, default.
"""

from __future__ import annotations

import argparse
import os
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deit.cli import Switch, number
from deit.errors import UserError
from deit.launch.cluster import (
    DEFAULT_FILE,
    FILE_VARIABLE,
    NO_GPU,
    UNTYPED_GPU,
    ClusterFile,
    Resources,
    load_cluster_file,
)
from deit.launch.recipes import (
    Recipe,
    load_recipe,
    options_to_argv,
    recipe_names,
    split_batch,
)
from deit.train.args import CommandLine, get_parser, parse_args

# As typed in a checkout of this code, or anywhere if the package is installed.
_CHECKOUT = (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()
TRAINING = ("deit/main.py",) if _CHECKOUT else ("-m", "deit.main")
LAUNCHER = "python deit/run_with_submitit.py" if _CHECKOUT else "deit-launch"
DEFAULT_JOB_DIR = "runs/%j"
DATA_PLACEHOLDER = "/path/to/imagenet"  # shown where a recipe is only looked at
_RESOURCE_NAMES = {f.name for f in fields(Resources)}
_ARRAY_OPTIONS = ("seed", "model")

_EPILOG = f"""\
examples:
  {LAUNCHER} --recipe d2_deit_base_patch16_LS --data-path IMAGENET
      a published training; --dry-run shows what would be submitted, --local needs no Slurm
  {LAUNCHER} --recipe d2_deit_base_patch16_LS --nodes 1 --ngpus 2 ...
      the same global batch on two GPUs, by accumulation
  {LAUNCHER} --model deit_small_patch16_LS --batch 64 --nodes 1 --ngpus 4 ...
      any training; --batch-size is per GPU
  {LAUNCHER} status runs/*
      state, epoch, accuracy, time left and curve of each run

recipes:
{textwrap.fill(" ".join(recipe_names()), 96, initial_indent="  ", subsequent_indent="  ")}
"""


@dataclass(frozen=True)
class JobSpec:
    """One submission: `options` of deit/main.py on `resources`, once for each of `array`."""

    name: str
    recipe: str | None
    resources: Resources
    options: dict[str, Any]
    array: tuple[dict[str, Any], ...]  # each task's own options; ({},) without --array
    job_dir: str
    local: bool

    def argv(self, task: int = 0) -> list[str]:
        """The arguments of deit/main.py for array task number `task`."""
        return options_to_argv(self.options | self.array[task], get_parser())

    def args(self, task: int = 0) -> argparse.Namespace:
        """The options of deit/main.py, defaults included."""
        return parse_args(self.argv(task))

    def global_batch(self) -> int:
        """Images an optimizer update sees."""
        args = self.args()
        return args.batch_size * args.update_freq * self.resources.processes

    def command(self, task: int = 0) -> str:
        """The same training started by hand: plain Python, or torchrun for several processes."""
        resources, start = self.resources, ["python"]
        if resources.processes > 1:
            start = ["torchrun", "--nproc-per-node", str(resources.ngpus)]
        if resources.nodes > 1:
            start[1:1] = ["--nnodes", str(resources.nodes), "--rdzv-backend", "c10d",
                          "--rdzv-endpoint", "FIRST_NODE:29500"]  # fmt: skip
        return shlex.join([*start, *TRAINING, *self.argv(task)])

    def describe(self) -> str:
        """One line for people."""
        title = f"recipe {self.recipe}" if self.recipe else self.name
        args = self.args()
        accumulation = f" x {args.update_freq} accumulated" if args.update_freq > 1 else ""
        return (
            f"{title}: {self.resources.describe()}, {args.batch_size} images each{accumulation}, "
            f"global batch {self.global_batch()}"
        )


def get_launch_parser() -> CommandLine:
    """deit/main.py's parser with the launcher's options added."""
    parser = get_parser(
        description="Start trainings on a Slurm cluster, or on this machine with --local.",
        usage="%(prog)s [--recipe NAME] [option of this script or of deit/main.py ...]\n"
        "       %(prog)s status FOLDER ...",
        epilog=_EPILOG,
    )
    what = parser.add_argument_group("what to start")
    what.add_argument("--recipe", metavar="NAME", help="a published training, or a .toml file")
    what.add_argument(
        "--array",
        metavar="OPTION=VALUES",
        help="one run for each value: seed=0-4, seed=0,7 or model=NAME,NAME",
    )
    what.add_argument("--local", action="store_true", help="run on this machine, without Slurm")
    what.add_argument(
        "--dry-run", action="store_true", help="show the sbatch script and the configuration only"
    )
    what.add_argument(
        "--print-command", action="store_true", help="print the same training without this script"
    )
    what.add_argument(
        "--job-dir",
        metavar="DIR",
        help="folder of the run, %%j is the job's id (default: "
        + DEFAULT_JOB_DIR.replace("%", "%%")
        + ")",
    )
    cluster = parser.add_argument_group(
        "cluster", f"Your own defaults live in {DEFAULT_FILE} (docs/cluster.md)."
    )
    cluster.add_argument(
        "--cluster-file", metavar="FILE", help=f"in place of {DEFAULT_FILE} or ${FILE_VARIABLE}"
    )
    for entry in fields(Resources):
        if "help" in entry.metadata:
            shown = f" (default: {entry.default})" if entry.default else ""
            cluster.add_argument(
                f"--{entry.name.replace('_', '-')}",
                metavar=entry.metadata["metavar"],
                type=entry.metadata["type"],
                help=entry.metadata["help"] + shown,
            )
    cluster.add_argument(
        "--timeout", metavar="HOURS", type=number(float, low=0.02), help="--time, in hours"
    )
    cluster.add_argument(
        "--use-volta32", action=Switch, default=False, help="--constraint volta32gb"
    )
    cluster.add_argument(
        "--setup",
        metavar="LINE",
        action="append",
        help="shell line before the training, such as 'module load CUDA'; may be repeated",
    )
    return parser


def make_spec(argv: Sequence[str]) -> tuple[JobSpec, argparse.Namespace]:
    """The spec for a command line, and the launcher's own flags (dry_run, print_command).

    Raises:
        UserError: unknown options, recipes, resources, or a global batch that cannot be kept.
    """
    parser = get_launch_parser()
    flags = parser.parse_args(argv)
    given = {name: getattr(flags, name) for name in flags.given}
    cluster = load_cluster_file(flags.cluster_file)
    recipe = load_recipe(flags.recipe) if flags.recipe else None
    own = _RESOURCE_NAMES | {"recipe", "array", "local", "dry_run", "print_command"}
    own |= {"job_dir", "cluster_file", "timeout", "use_volta32"}
    options = cluster.options | (recipe.options if recipe else {})
    options |= {name: value for name, value in given.items() if name not in own}
    resources = _resources(given, cluster, recipe, flags.local)
    if recipe:
        options["batch_size"], options["update_freq"] = split_batch(
            recipe.global_batch,
            resources.processes,
            largest=recipe.options["batch_size"],
            batch_size=given.get("batch_size"),
            update_freq=given.get("update_freq"),
        )
        if options.get("data_set") == "IMNET" and not options.get("data_path"):
            if not (flags.dry_run or flags.print_command):
                raise UserError(
                    f"recipe {recipe.name} trains on ImageNet: give --data-path FOLDER (with "
                    "train/ and val/ in it), or data_path under [options] in your cluster file"
                )
            options["data_path"] = DATA_PLACEHOLDER
    job_dir = given.get("job_dir") or cluster.job_dir or DEFAULT_JOB_DIR
    spec = JobSpec(
        name=recipe.name if recipe else parse_args(options_to_argv(options, get_parser())).model,
        recipe=recipe.name if recipe else None,
        resources=resources,
        options=options,
        array=_array(flags.array),
        job_dir=os.path.expandvars(os.path.expanduser(job_dir)),
        local=flags.local,
    )
    _check(spec)
    return spec, flags


def _resources(
    given: dict[str, Any], cluster: ClusterFile, recipe: Recipe | None, local: bool
) -> Resources:
    """What to ask for. A recipe says how many GPUs, the cluster (or the user) how many a node."""
    values = cluster.resources | {k: v for k, v in given.items() if k in _RESOURCE_NAMES}
    if "timeout" in given:
        if "time" in given:
            raise UserError("--timeout and --time both limit the job: give one of them")
        seconds = round(given["timeout"] * 3600)
        values["time"] = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    if given.get("use_volta32"):
        constraints = (values.get("constraint"), "volta32gb")
        values["constraint"] = "&".join(filter(None, constraints))
    values["setup"] = cluster.resources.get("setup", []) + given.get("setup", [])
    if local:
        if values.get("nodes", 1) != 1 and "nodes" in given:
            raise UserError(f"--local is one machine: --nodes {values['nodes']} is not possible")
        values["nodes"] = 1
        values = _local_devices(values, given)
    elif recipe:
        per_node = min(values.get("ngpus", Resources.ngpus), recipe.gpus)
        if "ngpus" not in given:
            values["ngpus"] = per_node
        if "nodes" not in given:
            values["nodes"] = max(1, recipe.gpus // max(1, values["ngpus"]))
    return Resources(**values)


def _local_devices(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """One process a GPU of this machine, or a single one on the CPU."""
    if "ngpus" in given and "tgpu" in given:
        return values
    import torch  # only here: counting GPUs is the one thing that needs it

    found = torch.cuda.device_count()
    tgpu = given.get("tgpu", UNTYPED_GPU if found else NO_GPU)
    ngpus = 1 if tgpu == NO_GPU else max(1, found)
    return values | {"tgpu": tgpu, "ngpus": given.get("ngpus", ngpus)}


def _array(text: str | None) -> tuple[dict[str, Any], ...]:
    """`seed=0-2` as ({"seed": 0}, {"seed": 1}, {"seed": 2})."""
    if text is None:
        return ({},)
    option, _, values = text.partition("=")
    if option not in _ARRAY_OPTIONS or not all(values.split(",")):
        raise UserError(f"--array {text}: give seed=0-4, seed=0,7 or model=NAME,NAME")
    if option == "model":
        return tuple({"model": name} for name in values.split(","))
    seeds: list[int] = []
    for part in values.split(","):
        first, dash, last = part.partition("-")
        try:
            seeds += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise UserError(f"--array {text}: {part!r} is no seed and no range a-b") from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--array {text}: an empty range, or a seed twice")
    return tuple({"seed": seed} for seed in seeds)


def _check(spec: JobSpec) -> None:
    """Refuse now what would otherwise fail in the queue, hours later."""
    for task in range(len(spec.array)):
        spec.args(task)
    if len(spec.array) > 1 and not any(tag in spec.job_dir for tag in ("%j", "%a")):
        raise UserError(
            f"--job-dir {spec.job_dir}: runs of an array need %j in it to tell them apart"
        )
