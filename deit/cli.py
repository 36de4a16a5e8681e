"""An `ArgumentParser` for the scripts here: one-line errors, either spelling, defaults shown.

parser = CommandLine(description="...")
run = OptionGroup(parser, "run")
run.add("--batch-size", number(int, low=1), 64, "N", "images per process")
run.switch("--compile", "compile the network")          # --compile and --no-compile
"""

from __future__ import annotations

import argparse
import ast
import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deit.errors import UserError, is_first_process, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Room for long option names, and lines that stay readable on a wide terminal."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=30, **kwargs)
        self._width = min(self._width, 98)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):  # its value is for old command lines, and needs no mention
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


# The spellings of ConvNeXt's published scripts.
_ON, _OFF = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


class Switch(argparse.BooleanOptionalAction):
    """--x and --no-x, each also with a value as in `--x true` (ConvNeXt's published scripts).

    `words` are further values, as in `--x both`.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, words: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.nargs, self.words = "?", words
        self.type = lambda text: self._value(text)  # argparse prints what it is

    def _value(self, text: str) -> bool | str:
        if text.lower() in _ON + _OFF:
            return text.lower() in _ON
        if text not in self.words:
            known = ", ".join(("true", "false", *self.words))
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}")
        return text

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        value = True if values is None else values
        negated = option_string is not None and option_string.startswith("--no-")
        if isinstance(value, str) and negated:
            raise argparse.ArgumentError(self, f"{option_string} cannot be {value!r}")
        setattr(namespace, self.dest, value if isinstance(value, str) else value is not negated)


class Options(argparse.Namespace):
    """Parsed options. `given` has the names of those that stood on the command line.

    It is a slot, so that `vars` and comparisons see nothing but the options.
    """

    __slots__ = ("given",)


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that takes underscores for dashes and raises `UserError`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        dashed = lambda option: option.group().replace("_", "-")  # noqa: E731
        return super().parse_known_args([re.sub("^--[^=]*", dashed, a) for a in args], namespace)

    def parse_args(self, args=None, namespace=None):
        """As argparse does; returns `Options`."""
        namespace, unknown = self.parse_known_args(args, namespace or Options())
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hint = suggest(unknown[0].split("=")[0], known) if unknown[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        # argparse leaves alone what a namespace has already, unless it is on the command line
        absent: list[Any] = []  # options that append copy it
        probe = argparse.Namespace(**dict.fromkeys(vars(namespace), absent))
        self.parse_known_args(args, probe)
        namespace.given = frozenset(k for k, v in vars(probe).items() if v is not absent)
        if "kernels" in namespace:
            _note_kernels(namespace.kernels)
        if "compile_mode" in namespace:
            _settle_compile(namespace)
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, which the scripts print as one line, exit code 2."""
        raise UserError(f"{message} (--help lists all options)")


class OptionGroup:
    """Adds options to an argument group of a parser; each help text ends in its default."""

    def __init__(
        self, parser: argparse.ArgumentParser, title: str, description: str | None = None
    ) -> None:
        self._group = parser.add_argument_group(title, description)

    def add(
        self,
        flags: str,
        type: Callable[[str], Any],
        default: Any,
        metavar: str | tuple[str, ...] | None,
        help: str,
        **kwargs: Any,
    ) -> None:
        """An option with a value. `flags` are its spellings, separated by blanks.

        The help text must say itself what a default of None or '' means.
        """
        if default not in (None, ""):
            help += f" (default: {default})"
        self._group.add_argument(
            *flags.split(),
            type=type,
            default=default,
            metavar=metavar,
            help=help.replace("%", "%%"),  # argparse formats help texts with %
            **kwargs,
        )

    def switch(
        self,
        flags: str,
        help: str,
        default: bool | None = False,
        words: tuple[str, ...] = (),
    ) -> None:
        """A switch --x with its --no-x; a default of None leaves the choice to the network.

        `words` are values that it may have too, as in `--x both`.
        """
        shown = {True: "on", False: "off", None: "the network's own"}[default]
        action = self._group.add_argument(
            *flags.split(), action=Switch, default=default, words=words
        )
        # Set afterwards: some Python versions append the default in words of their own.
        action.help = f"{help} (default: {shown})".replace("%", "%%")


def add_kernels(group: OptionGroup) -> None:
    """The option `--kernels` of earlier versions, which has no effect any more."""
    help = "of no effect, as the environment variable DEIT_KERNELS: nothing is left to choose "
    group.add("--kernels", str, None, "MODE", help + "(default: none)")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table in `path`; `what` names the file in the `UserError` of an unreadable one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} {path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from None


@functools.cache  # said once, however often and by whomever command lines are parsed
def _note_kernels(mode: str | None) -> None:
    asked = "--kernels" if mode else "DEIT_KERNELS" if os.environ.get("DEIT_KERNELS") else None
    if asked and is_first_process():
        print(f"note    {asked} has no effect any more; --compile is fastest", file=sys.stderr)


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Each call of a block would begin a new replay, and overwrite what the one before returned.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def add_compile(group: OptionGroup, help: str) -> None:
    """The options `--compile`, and `--compile-mode` and `--compile-blocks`, which turn it on."""
    modes = f"mode of torch.compile: {', '.join(COMPILE_MODES)}; implies --compile"
    group.switch("--compile", help)
    group.add("--compile-mode", str, "default", "MODE", modes, choices=COMPILE_MODES)
    group.switch(
        "--compile-blocks",
        "compile each block by itself, equal ones once: much sooner done than the whole network; "
        "implies --compile",
    )


def _settle_compile(args: Options) -> None:
    if "compile" not in args.given:
        args.compile = args.compile_blocks or "compile_mode" in args.given
    if args.compile and args.compile_blocks and args.compile_mode in CUDA_GRAPHS:
        raise UserError(
            f"--compile-blocks with --compile-mode {args.compile_mode}: its CUDA graphs hold a "
            "whole network; use default or max-autotune-no-cudagraphs, or omit --compile-blocks"
        )


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """An argparse type: a file that can be written, ending in one of `suffixes` if there are any.

    Of a link it is the file that the link leads to. Measuring takes long, so what would keep the
    results from being written is told before it.
    """

    def check(text: str) -> Path:
        path = Path(text)
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(
                f"{text!r} is a folder or a device, and must be a file"
            )
        if path.is_symlink():  # renaming over it would leave what it leads to as it was
            path = path.resolve()
        if suffixes and path.suffix.lower() not in suffixes:
            wanted = ", ".join(suffixes)
            raise argparse.ArgumentTypeError(f"{str(path)!r} must end in one of {wanted}")
        folder = path.resolve().parent
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(folder)!r} for {text!r}")
        try:  # permissions do not tell of file systems that are read-only
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot be written: {error.strerror}"
            ) from None
        return path

    return check


def key_value(text: str) -> tuple[str, Any]:
    """`depth=4` as ("depth", 4): the value is a Python literal, or else a string."""
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def number(
    kind: type[int] | type[float],
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
) -> Callable[[str], int | float]:
    """An argparse type: a finite number of `kind` with low <= number <= high, above < number."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not finite")
        if not (low <= value <= high and above < value):
            bounds = f"at least {low:g}" if low > above else f"above {above:g}"
            bounds += f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bounds}")
        return value

    return parse


def duration(seconds: float) -> str:
    """For people, in the two largest units: `2d 3h`, `3h 5min`, `1min 20s`, `12s`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    units = {"d": days, "h": hour, "min": minute, "s": second}
    return " ".join([f"{count}{unit}" for unit, count in units.items() if count][:2]) or "0s"
