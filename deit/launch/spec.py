"""From a command line to a `JobSpec`: what to run, on what, where.

Precedence, option by option: command line, recipe, the user's cluster file, default.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit.cli import CommandLine, Options, number
from deit.errors import UserError
from deit.launch.cluster import (
    DEFAULT_FILE,
    FILE_VARIABLE,
    NO_GPU,
    UNTYPED_GPU,
    add_cluster_options,
    read_cluster_file,
)
from deit.launch.recipes import Recipe, load_recipe, options_to_argv, recipe_names, split_batch
from deit.train.args import get_parser, parse_args

# As typed in a checkout of this code, or anywhere if the package is installed.
_CHECKOUT = (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()
TRAINING = ("deit/main.py",) if _CHECKOUT else ("-m", "deit.main")
LAUNCHER = "python deit/run_with_submitit.py" if _CHECKOUT else "deit-launch"
DATA_PLACEHOLDER = "/path/to/imagenet"  # shown where a recipe is only looked at

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
class Task:
    """One training of a job, which has several with --array only."""

    title: str  # of those of an array: seed 3
    argv: list[str]
    args: Namespace
    """What deit/main.py makes of `argv`, defaults included."""


@dataclass(frozen=True)
class JobSpec:
    """One submission."""

    name: str
    """The recipe's, or the network's."""
    asked: Options
    """The launcher's own options, settled: nodes, ngpus, local, job_dir, sbatch, ..."""
    tasks: list[Task]

    @property
    def processes(self) -> int:
        return self.asked.nodes * self.asked.ngpus

    @property
    def global_batch(self) -> int:
        """Images an optimizer update sees."""
        args = self.tasks[0].args
        return args.batch_size * args.update_freq * self.processes

    @property
    def gres(self) -> str | None:
        """The generic resource a node must have: gpu:A100:8."""
        asked = self.asked
        kind = "" if asked.tgpu == UNTYPED_GPU else f"{asked.tgpu}:"
        return None if asked.tgpu == NO_GPU else f"gpu:{kind}{asked.ngpus}"

    def command(self, task: Task) -> str:
        """The same training started by hand: plain Python, or torchrun for several processes."""
        asked, start = self.asked, ["python"]
        if self.processes > 1:
            start = ["torchrun", "--nproc-per-node", str(asked.ngpus)]
        if asked.nodes > 1:
            start[1:1] = ["--nnodes", str(asked.nodes), "--rdzv-backend", "c10d",
                          "--rdzv-endpoint", "FIRST_NODE:29500"]  # fmt: skip
        return shlex.join([*start, *TRAINING, *task.argv])

    def describe(self) -> str:
        """One line for people."""
        asked, args = self.asked, self.tasks[0].args
        title = f"recipe {self.name}" if asked.recipe else self.name
        kind = {NO_GPU: "CPU processes", UNTYPED_GPU: "GPUs"}.get(asked.tgpu, asked.tgpu)
        accumulation = f" x {args.update_freq} accumulated" if args.update_freq > 1 else ""
        return (
            f"{title}: {asked.nodes} node{'s' if asked.nodes > 1 else ''} x {asked.ngpus} {kind}, "
            f"{args.batch_size} images each{accumulation}, global batch {self.global_batch}"
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
    runs = "one run for each value: seed=0-4, seed=0,7 or model=NAME,NAME"
    what.add_argument("--array", metavar="OPTION=VALUES", help=runs)
    for flag, effect in {
        "--local": "run on this machine, without Slurm",
        "--dry-run": "show the sbatch script and the configuration only",
        "--print-command": "print the same training without this script",
    }.items():
        what.add_argument(flag, action="store_true", help=effect)
    cluster = add_cluster_options(parser)
    cluster.add("--timeout", number(float, low=0.02), None, "HOURS", "--time, in hours")
    cluster.switch("--use-volta32", "--constraint volta32gb")
    file = f"in place of {DEFAULT_FILE} or ${FILE_VARIABLE}"
    cluster.add("--cluster-file", str, None, "FILE", file)
    return parser


def make_spec(argv: Sequence[str]) -> JobSpec:
    """The spec for a command line.

    Raises:
        UserError: unknown options, recipes, resources, or a global batch that cannot be kept.
    """
    parser, training = get_launch_parser(), get_parser()
    defaults, options = read_cluster_file(parser.parse_args(argv).cluster_file)
    asked = parser.parse_args(argv, defaults)
    recipe = load_recipe(asked.recipe) if asked.recipe else None
    options |= recipe.options if recipe else {}
    for name in vars(training.parse_args([])):
        value = vars(asked).pop(name)
        if name in asked.given:
            options[name] = value
    _settle(asked, recipe)
    if recipe:
        options["batch_size"], options["update_freq"] = split_batch(
            recipe.global_batch,
            asked.nodes * asked.ngpus,
            largest=recipe.options["batch_size"],
            **{k: options[k] for k in ("batch_size", "update_freq") if k in asked.given},
        )
        if options.get("data_set") == "IMNET" and not options.get("data_path"):
            if not (asked.dry_run or asked.print_command):
                raise UserError(
                    f"recipe {recipe.name} trains on ImageNet: give --data-path FOLDER (with "
                    "train/ and val/ in it), or data_path under [options] in your cluster file"
                )
            options["data_path"] = DATA_PLACEHOLDER
    tasks = []
    for own in _array(asked.array):
        words = options_to_argv(options | own, training)
        title = " ".join(f"{name} {value}" for name, value in own.items())
        tasks.append(Task(title, words, parse_args(words, training)))
    folders = {"--output-dir": tasks[0].args.output_dir or "%j"}  # without one the job's folder
    if "%a" not in asked.job_dir:
        folders["--job-dir"] = asked.job_dir
    for option, folder in folders.items():
        if len(tasks) > 1 and "%j" not in folder:
            raise UserError(f"{option} {folder}: runs of an array need %j in it to tell them apart")
    return JobSpec(recipe.name if recipe else tasks[0].args.model, asked, tasks)


def _settle(asked: Options, recipe: Recipe | None) -> None:
    """Say in `asked` how many processes there are, of what kind, and for how long.

    A recipe says how many GPUs, the cluster (or the user, by an option) how many a node.
    """
    given = asked.given
    asked.job_dir = os.path.expandvars(os.path.expanduser(asked.job_dir))
    asked.setup = asked.setup or []
    if "timeout" in given:
        if "time" in given:
            raise UserError("--timeout and --time both limit the job: give one of them")
        asked.time = math.ceil(round(asked.timeout * 3600) / 60)
    if asked.use_volta32:
        asked.constraint = "&".join(filter(None, (asked.constraint, "volta32gb")))
    if asked.local:
        if "nodes" in given and asked.nodes != 1:
            raise UserError(f"--local is one machine: --nodes {asked.nodes} is not possible")
        asked.nodes = 1
        if not given >= {"ngpus", "tgpu"}:  # a process a GPU of this machine, or one on the CPU
            import torch  # only here: counting GPUs is the one thing that needs it

            found = torch.cuda.device_count()
            if "tgpu" not in given:
                asked.tgpu = UNTYPED_GPU if found else NO_GPU
            if "ngpus" not in given:
                asked.ngpus = 1 if asked.tgpu == NO_GPU else max(1, found)
    elif recipe:
        if "ngpus" not in given:
            asked.ngpus = min(asked.ngpus, recipe.gpus)
        if "nodes" not in given:
            asked.nodes = max(1, recipe.gpus // asked.ngpus)


def _array(text: str | None) -> list[dict[str, Any]]:
    """`seed=0-2` as [{"seed": 0}, {"seed": 1}, {"seed": 2}]; one training without own options."""
    if text is None:
        return [{}]
    option, _, values = text.partition("=")
    words: list[Any] = values.split(",")
    if option == "seed":
        ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", word) for word in words]
        words = []
        if all(ranges):
            words = [seed for r in ranges for seed in range(int(r[1]), int(r[2] or r[1]) + 1)]
    if option not in ("seed", "model") or not words or "" in words or len({*words}) < len(words):
        raise UserError(f"--array {text}: give seed=0-4, seed=0,7 or model=NAME,NAME, each once")
    return [{option: word} for word in words]
