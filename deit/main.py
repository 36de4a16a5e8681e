"""Train and evaluate image classifiers.

    python deit/main.py --model d2_deit_small_patch16_LS --data-path IMAGENET --output-dir runs/s
    torchrun --nproc-per-node 8 deit/main.py ... --resume auto
    python deit/main.py --model d2_deit_small_patch16_LS --data-path IMAGENET --resume FILE --eval

Ctrl-C, SIGTERM and SIGUSR1 save at the next update and end with status 0; `--resume auto` goes on
at that very update. Status 2 is a wrong command line or an input that cannot be used, 130 a second
Ctrl-C. Other Python code calls `main(args)`, and may stop it by `request_stop`.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

# Torch's own lines about a broken connection come with pages of C++ frames. Read when torch is
# imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch.distributed.elastic.multiprocessing.errors import record

from deit.cli import duration
from deit.data.workers import worker_death
from deit.errors import EXIT_USER_ERROR, UserError, is_first_process, run_command
from deit.train.args import parse_args
from deit.train.build import set_precision
from deit.train.distributed import RankInfo, choose_device, connect
from deit.train.engine import (
    Batches,
    NonFiniteLossError,
    RunningLoss,
    evaluate,
    train_one_epoch,
)
from deit.train.evaluation import evaluate_checkpoint
from deit.train.folder import BEST, EPOCH_COPY, LAST, check_unused, claim
from deit.train.metrics import Scores
from deit.train.run import Run
from deit.train.stopping import Stopped, request_stop, stop_on_signals

__all__ = ["main", "request_stop"]

PATIENCE = 5.0
"""Seconds for rank 0 to say what is wrong with the command line before a launcher ends it."""


def main(args: Namespace) -> int:
    """Train or evaluate as `args` (from `deit.train.args.parse_args`) say.

    Returns:
        The exit status: 0 when the training is complete, or was stopped after saving its state
        (`deit.train.stopping.stop_reason()` then says why).

    Raises:
        UserError: something that was asked for cannot be.
    """
    info = RankInfo.from_env(url=args.dist_url, world_size=args.world_size)
    device = choose_device(args.device, info.local_rank)
    set_precision(args, device)
    last = Path(args.output_dir) / LAST if args.output_dir and not args.eval else None
    with connect(info, device, timedelta(minutes=args.dist_timeout), last) as processes:
        if args.eval:
            evaluate_checkpoint(args, processes)
            return 0
        with stop_on_signals(announce=processes.is_main), ExitStack() as ends:
            if args.output_dir and processes.is_main:
                ends.enter_context(claim(Path(args.output_dir)))
                if not args.overwrite:
                    check_unused(Path(args.output_dir), args.resume)
            run = Run(args, processes)
            ends.callback(run.close)
            train(run)
    return 0


def train(run: Run) -> None:
    """Train to the end, or to a stop that was asked for."""
    args, progress, reporter = run.args, run.state.progress, run.reporter
    batches = iter(run.train_loader)
    try:
        while progress.epoch < args.epochs:
            train_epoch(run, batches)
        how = "finished"
    except Stopped as stop:
        run.state.running.mean(run.processes)  # a state that is broken is not to be saved
        run.save([LAST])
        how = f"stopped ({stop}) in epoch {progress.epoch + 1} after step {progress.step}"
    except NonFiniteLossError as error:
        reporter.close()
        epoch, step = progress.epoch, error.update + 1
        raise UserError(
            f"the loss became infinite or NaN in epoch {epoch + 1} at step {step} "
            f"(update {epoch * run.updates + step}); {run.last_state()}; try a lower --lr, "
            "--clip-grad 1, more --warmup-epochs, --amp-dtype bfloat16 or --no-use-amp"
        ) from error
    except UserError as error:
        raise UserError(f"{error}; {run.last_state()}") from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        death = worker_death(error)
        if death is None:
            raise
        raise UserError(f"{death}; {run.last_state()}") from error
    finally:
        reporter.stop()
    run.agreement.finish()
    run.close()
    run.report_end(how)


def train_epoch(run: Run, batches: Batches) -> None:
    """One epoch, or what is left of it: train, evaluate, log, save."""
    args, state, progress, reporter = run.args, run.state, run.state.progress, run.reporter
    before, start = progress.seconds, time.perf_counter()
    epoch = progress.epoch
    title = f"epoch {epoch + 1}/{args.epochs}"
    scores: dict[str, Scores] = {}
    reporter.start(title, run.updates, progress.step)
    try:
        loss = train_one_epoch(
            state,
            batches,
            updates=run.updates,
            agreement=run.agreement,
            on_update=run.note_update,
        )
        record = {"epoch": epoch, "train_loss": loss, "train_lr": run.learning_rate()}
        run.save([LAST])  # before anything that can fail: the epoch's updates are done
        due = (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs
        if due and not args.disable_eval:
            for kind, network in run.evaluated.items():
                reporter.start("testing", len(run.val_loader))
                scores[kind] = evaluate(
                    network,
                    run.val_loader,
                    args,
                    precision=state.precision,
                    processes=run.processes,
                    agreement=run.agreement,
                    on_batch=reporter.on_batch,
                )
                record |= scores[kind].as_log(kind)
    finally:
        progress.seconds = before + time.perf_counter() - start
        reporter.stop()
    for _ in range(run.batches - run.updates * args.update_freq):
        next(batches)
    best = [kind for kind, score in scores.items() if progress.improves(score.acc1, kind)]
    state.schedule.step(scores[""].acc1 if scores else None)
    record |= {"n_parameters": run.parameters, "time": round(progress.seconds, 3)}
    line = f"{title}  train loss {loss:.4f}"
    for kind, score in scores.items():
        best_acc1 = progress.best_ema_acc1 if kind else progress.best_acc1
        line += f"  {'average ' if kind else ''}{score}  best {best_acc1:.3f}"
    reporter.say(f"{line}  {duration(progress.seconds)}")
    bad = sum(score.bad for score in scores.values())
    if bad:
        reporter.say(f"note    the logits of {bad} test images are infinite or NaN")
    progress.next_epoch(record)
    reporter.end_epoch(record)
    state.running = RunningLoss(run.processes.device)
    names = [BEST.format(kind) for kind in best]
    if args.save_freq and (epoch + 1) % args.save_freq == 0:
        names.append(EPOCH_COPY.format(epoch))
    run.save([*names, LAST])  # what a resumed run reads comes last


@record  # so that torchrun's table of failures shows the traceback
def command(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line (default: this process's own); returns the exit status."""
    return run_command(lambda: main(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> Namespace:
    try:
        return parse_args(argv)
    except UserError:
        if not is_first_process():  # it has the same command line, and says what is wrong
            time.sleep(PATIENCE)
            raise SystemExit(EXIT_USER_ERROR) from None
        raise


if __name__ == "__main__":
    sys.exit(command())
