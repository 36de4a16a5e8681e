"""Train the Fashion-MNIST grid, or what is missing of it: one small result file a cell.

    python experiments/fashion_mnist/run.py --quick              # for CPUs, small and short
    python experiments/fashion_mnist/run.py --devices cuda:0 cuda:1 --jobs 8
    python experiments/fashion_mnist/draw.py                     # then: tables and figures

Ctrl-C or SIGTERM saves the trainings under way; the same command goes on with them. Finished cells
are skipped. Status 0: the grid is complete; 1: a cell failed; 2: a wrong command line; 3: stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from deit.cli import CommandLine, OptionGroup, duration, number
from deit.errors import UserError, one_line, one_line_errors
from deit.saving import write_text
from deit.train.distributed import choose_device
from deit.train.folder import claim
from deit.train.stopping import Stopped, stop_on_signals, stop_reason
from experiments.fashion_mnist.cell import Data, Training
from experiments.fashion_mnist.grid import FULL, QUICK, Cell, Plan, cells
from experiments.fashion_mnist.images import find_data

RESULTS = Path(__file__).resolve().parent / "results"
STATES = Path(__file__).resolve().parents[2] / "runs" / "fashion_mnist"
FAILED, STOPPED = 1, 3
# Small networks keep a GPU busy only together.
JOBS_PER_GPU = 4


def get_parser() -> CommandLine:
    parser = CommandLine(
        description=__doc__.splitlines()[0], usage="%(prog)s [--quick] [option ...]"
    )
    group = OptionGroup(parser, "grid")
    group.switch("--quick", "the reduced grid: smaller networks, shorter trainings, fewer variants")
    group.add(
        "--jobs",
        number(int, low=1),
        None,
        "N",
        "trainings at a time (default: one for each CPU core, with one thread each, or "
        f"{JOBS_PER_GPU} for each GPU)",
    )
    group.add(
        "--devices",
        str,
        None,
        "NAME",
        "devices to share the trainings among: cpu, cuda, cuda:N (default: all GPUs, or the CPU)",
        nargs="+",
    )
    group.add(
        "--data-path",
        str,
        "",
        "DIR",
        "folder with Fashion-MNIST's idx files; downloaded if they are not there (default: "
        "Debian's package dataset-fashion-mnist)",
    )
    group.add("--results", str, str(RESULTS), "DIR", "folder of the result files")
    group.add("--states", str, str(STATES), "DIR", "folder of the states of unfinished trainings")
    group.add(
        "--only", str, "", "TEXT", "train the cells alone whose names contain this (default: all)"
    )
    return parser  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = get_parser().parse_args(argv)
    plan = QUICK if args.quick else FULL
    devices = find_devices(args.devices)
    jobs = args.jobs or default_jobs(devices)
    folder = find_data(args.data_path)
    results = Path(args.results) / plan.name
    results.mkdir(parents=True, exist_ok=True)
    wanted = [cell for cell in cells(plan) if args.only in cell.name]
    todo = [cell for cell in wanted if not is_done(results, cell, plan)]
    print(f"{len(wanted)} trainings, {len(wanted) - len(todo)} of them done before", flush=True)
    if not todo:
        return 0
    jobs = min(jobs, len(todo))
    places = [devices[n % len(devices)] for n in range(jobs)]
    print(f"training {jobs} at a time on {', '.join(dict.fromkeys(places))}", flush=True)
    command = "python experiments/fashion_mnist/run.py" + "".join(
        f" {shlex.quote(word)}" for word in (sys.argv[1:] if argv is None else argv)
    )
    settings = {
        "plan": plan,
        "data": folder,
        "results": results,
        "states": Path(args.states) / plan.name,
        "command": command,
    }
    return supervise(todo, places, settings)


def find_devices(names: Sequence[str] | None) -> list[str]:
    """The devices to use, each with its number."""
    if names is None:
        count = torch.cuda.device_count()
        return [f"cuda:{n}" for n in range(count)] or ["cpu"]
    try:
        return [str(choose_device(name)) for name in names]
    except RuntimeError as error:  # torch's own for a name it cannot read
        raise UserError(f"--devices {' '.join(names)}: {one_line(error)}") from error


def default_jobs(devices: Sequence[str]) -> int:
    if devices == ["cpu"]:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return JOBS_PER_GPU * len(devices)


def is_done(results: Path, cell: Cell, plan: Plan) -> bool:
    """Whether there is a result of this very cell by this very plan."""
    try:
        found = json.loads((results / f"{cell.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # as JSON, where tuples are lists
    origin = json.loads(json.dumps({"cell": cell.as_dict(), "plan": asdict(plan)}))
    return {key: found.get(key) for key in origin} == origin


def supervise(todo: Sequence[Cell], places: Sequence[str], settings: dict[str, Any]) -> int:
    """Let one process a place train the cells; tell what they report; pass on stops."""
    context = multiprocessing.get_context("spawn")
    tasks, reports = context.Queue(), context.Queue()
    for cell in todo:
        tasks.put(cell)
    for _ in places:
        tasks.put(None)
    workers = [
        context.Process(target=work, args=(place, tasks, reports, settings)) for place in places
    ]
    started, finished, failed, told = time.monotonic(), 0, 0, False
    with stop_on_signals():
        for worker in workers:
            worker.start()
        while True:
            # asked before the queue is: what a worker reported before it ended is in it then
            alive = any(worker.is_alive() for worker in workers)
            try:
                name, text, good = reports.get(timeout=0.5)
            except queue.Empty:
                if not alive:
                    break
            else:
                finished, failed = finished + 1, failed + (not good)
                left = (time.monotonic() - started) / finished * (len(todo) - finished)
                place = f"[{finished}/{len(todo)}]"
                print(f"{place} {name}: {text}; about {duration(left)} left", flush=True)
            if stop_reason() is not None and not told:
                told = True
                for worker in workers:
                    worker.terminate()  # SIGTERM: they save and end
        for worker in workers:
            worker.join()
    broken = [worker.exitcode for worker in workers if worker.exitcode]
    if broken:
        print(f"error: training processes ended with status {broken}", file=sys.stderr)
    if failed or (broken and not told):
        return FAILED
    if finished < len(todo):
        print("stopped; the same command goes on from here")
        return STOPPED
    return 0


def work(place: str, tasks: Any, reports: Any, settings: dict[str, Any]) -> None:
    """The body of a process: train cell after cell on one device."""
    device = choose_device(place)
    if device.type == "cpu":
        torch.set_num_threads(1)
    plan, results = settings["plan"], settings["results"]
    with stop_on_signals(announce=False):
        try:
            data = Data.load(settings["data"], device)
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(FAILED)
        while stop_reason() is None and (cell := tasks.get()) is not None:
            state = settings["states"] / cell.name
            try:
                with claim(state):  # another grid may be under way in the same folder
                    result = Training(cell, plan, data, device, state).run(settings["command"])
                    write_text(results / f"{cell.name}.json", json.dumps(result, indent=1) + "\n")
                    shutil.rmtree(state)
            except Stopped:
                break
            except UserError as error:
                reports.put((cell.name, f"failed: {one_line(error)}", False))
                continue
            except Exception:
                reports.put((cell.name, f"failed\n{traceback.format_exc()}", False))
                continue
            text = "{accuracy:.2f} %, mirrored {accuracy_mirrored:.2f} %, {seconds:.0f} s"
            reports.put((cell.name, text.format(**result), True))
    tasks.cancel_join_thread()


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
