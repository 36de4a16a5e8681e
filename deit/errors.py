"""What users see when they ask for something that cannot be: one clear line, exit code 2.

Library code raises `UserError`; every command line runs its body under `one_line_errors`.
"""

from __future__ import annotations

import difflib
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A wrong value from a user. The message shows the value and says what would be right."""


def one_line(error: BaseException) -> str:
    """The message of `error` with every run of white space (line breaks too) as one blank."""
    return " ".join(str(error).split()) or type(error).__name__


def one_line_errors(body: Callable[[], int | None]) -> int:
    """Run `body` and return its exit status (None is 0).

    A `UserError` becomes the one line `error: ...` on stderr and status 2. Everything else is a
    defect of this code and keeps its traceback.
    """
    try:
        return body() or 0
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process, as torchrun's and srun's variables say."""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"


def run_command(body: Callable[[], int | None]) -> int:
    """`one_line_errors` for a whole process: Ctrl-C is one line too, and status 130.

    Whoever reads what is printed, as `head`, may have seen enough: the process ends, with status 0
    if it was not through.
    """
    status = 0
    try:
        status = one_line_errors(body)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # another pipe than that of the output
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):  # rich's answer to one
            raise
    drop_output()
    return status


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are told unasked
    return bool(poll.poll(0))


def drop_output() -> None:
    """Send what is printed from here on, and what waits to be written, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def some(names: Sequence[str], count: int = 3) -> str:
    """The first `count` of `names`, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`; did you mean a, b or c?` with the known names nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f"; did you mean {listed}?"
