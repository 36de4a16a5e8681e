"""Train and evaluate image classifiers.

    python deit/main.py --model d2_deit_small_patch16_LS --data-path IMAGENET --output-dir runs/s
    torchrun --nproc-per-node 8 deit/main.py ... --resume auto
    python deit/main.py --model d2_deit_small_patch16_LS --data-path IMAGENET --resume FILE --eval

Ctrl-C, SIGTERM and SIGUSR1 save at the next update and end with status 0; `--resume auto` goes on
at that very update. Status 2 is a wrong command line or an input that cannot be used, 130 a second
Ctrl-C. Other Python code calls `main(args)`, and may stop it by `request_stop`.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

# Torch's own lines about a broken connection come with pages of C++ frames. Read when torch is
# imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from deit.data.workers import is_worker_death, worker_death
from deit.errors import UserError, run_command
from deit.train.args import parse_args
from deit.train.build import set_precision
from deit.train.distributed import RankInfo, choose_device, connect
from deit.train.engine import (
    Batches,
    NonFiniteLossError,
    as_log,
    describe,
    evaluate,
    mean_loss,
    train_one_epoch,
)
from deit.train.evaluation import evaluate_once
from deit.train.metrics import Scores
from deit.train.reporting import duration
from deit.train.run import LAST, Run, claim_folder
from deit.train.stopping import Stopped, request_stop, stop_on_signals
from deit.train.training import build_run

__all__ = ["main", "request_stop"]


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
    with connect(info, device, timedelta(minutes=args.dist_timeout)) as processes:
        if args.eval:
            both = args.model_ema_eval == "both"
            for ema in (False, True) if both else (args.model_ema_eval,):
                which = copy.copy(args)
                which.model_ema_eval = ema
                evaluate_once(which, processes)
            return 0
        with stop_on_signals(announce=processes.is_main), claim_folder(args, processes):
            run = build_run(args, processes)
            try:
                train(run)
            finally:
                run.close()
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
        mean_loss(run.state.running, run.processes)  # a state that is broken is not to be saved
        run.save([LAST])
        how = f"stopped ({stop}) in epoch {progress.epoch + 1} after step {progress.step}"
    except NonFiniteLossError as error:
        reporter.close()
        raise UserError(explain_non_finite(run, error)) from error
    except UserError as error:
        raise UserError(f"{error}; {run.last_state()}") from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not is_worker_death(error):
            raise
        raise UserError(f"{worker_death(error)}; {run.last_state()}") from error
    finally:
        reporter.stop()
    run.agreement.finish()
    run.close()
    curves = reporter.close()
    best = ""
    if progress.best_epoch >= 0:
        best = f"; best Acc@1 {progress.best_acc1:.3f} in epoch {progress.best_epoch + 1}"
    if progress.best_ema_epoch >= 0:
        best += f", of the average {progress.best_ema_acc1:.3f} in {progress.best_ema_epoch + 1}"
    spent = sum(record["time"] for record in progress.history) + progress.seconds
    reporter.say(f"{how}, {duration(spent)} of training{best}")
    if args.output_dir and args.save_ckpt:
        again = "" if how == "finished" else "; --resume auto goes on from there"
        reporter.say(f"saved   {Path(args.output_dir) / LAST}{again}")
    if curves is not None:
        reporter.say(f"curves  {curves}")


def train_epoch(run: Run, batches: Batches) -> None:
    """One epoch, or what is left of it: train, evaluate, log, save."""
    args, state, progress, reporter = run.args, run.state, run.state.progress, run.reporter
    before, start = progress.seconds, time.perf_counter()
    epoch = progress.epoch
    title = f"epoch {epoch + 1}/{args.epochs}"
    reporter.start(title, run.updates, progress.step)
    try:
        loss = train_one_epoch(
            run.train_step,
            batches,
            updates=run.updates,
            start=progress.step,
            done_before=epoch * run.updates,
            running=state.running,
            processes=run.processes,
            agreement=run.agreement,
            on_update=run.note_update,
        )
        record = {"epoch": epoch, "train_loss": loss, "train_lr": run.learning_rate()}
        run.save([LAST])  # before anything that can fail: the epoch's updates are done
        scores = ema_scores = None
        due = (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs
        if due and not args.disable_eval:
            scores = evaluate_run(run, run.evaluated)
            record |= as_log(scores)
            if run.also_evaluated is not None:
                ema_scores = evaluate_run(run, run.also_evaluated)
                record |= as_log(ema_scores, "_ema")
    finally:
        progress.seconds = before + time.perf_counter() - start
        reporter.stop()
    for _ in range(run.batches - run.updates * args.update_freq):
        next(batches)
    best = scores is not None and scores.acc1 > progress.best_acc1
    if best:
        progress.best_acc1, progress.best_epoch = scores.acc1, epoch
    best_ema = ema_scores is not None and ema_scores.acc1 > progress.best_ema_acc1
    if best_ema:
        progress.best_ema_acc1, progress.best_ema_epoch = ema_scores.acc1, epoch
    state.schedule.step(epoch, None if scores is None else scores.acc1)
    record |= {"n_parameters": run.parameters, "time": round(progress.seconds, 3)}
    test = "" if scores is None else f"  {describe(scores)}  best {progress.best_acc1:.3f}"
    if ema_scores is not None:
        test += f"  average {describe(ema_scores)}  best {progress.best_ema_acc1:.3f}"
    reporter.say(f"{title}  train loss {loss:.4f}{test}  {duration(progress.seconds)}")
    bad = sum(each.bad for each in (scores, ema_scores) if each is not None)
    if bad:
        reporter.say(f"note    the logits of {bad} test images are infinite or NaN")
    reporter.end_epoch(record)
    progress.next_epoch(record)
    state.running.reset()
    run.save(run.names_after_epoch(epoch, best, best_ema))


def evaluate_run(run: Run, network: nn.Module) -> Scores:
    """Evaluate the network of a training, or its average."""
    args = run.args
    run.reporter.start("testing", len(run.val_loader))
    return evaluate(
        network,
        run.val_loader,
        precision=run.state.precision,
        processes=run.processes,
        sharded=args.dist_eval,
        batch_size=args.batch_size,
        input_size=args.input_size,
        pad=args.compile,
        flop=args.flop_eval,
        agreement=run.agreement,
        on_batch=run.reporter.on_batch,
    )


def explain_non_finite(run: Run, error: NonFiniteLossError) -> str:
    """Where the loss broke, what is still good, and what to try."""
    epoch = run.state.progress.epoch
    return (
        f"the loss became infinite or NaN in epoch {epoch + 1} at step {error.update + 1} "
        f"(update {epoch * run.updates + error.update + 1}); {run.last_state()}; try a lower --lr, "
        "--clip-grad 1, more --warmup-epochs, --amp-dtype bfloat16 or --no-use-amp"
    )


@record  # so that torchrun's table of failures shows the traceback
def command(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line (default: this process's own); returns the exit status."""
    return run_command(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(command())
