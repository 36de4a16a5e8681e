"""Recipes: one TOML file a published training, a base plus its difference.

    base = "base/vit"       # another recipe file, without suffix, relative to this one
    gpus = 16               # processes of the published run, one a GPU

    [options]               # options of deit/main.py, in their underscore spelling
    batch_size = 128        # per process

A recipe fixes the *global batch* (batch_size x gpus x update_freq), not the machine: `split_batch`
lays it out over whatever processes there are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit.cli import Switch, key_value, read_toml
from deit.errors import UserError, suggest
from deit.train.args import get_parser

RECIPES = Path(__file__).resolve().parents[1] / "recipes"  # a part of the package


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: `options` are those of the bases overridden by its own."""

    name: str
    gpus: int
    options: dict[str, Any]

    @property
    def global_batch(self) -> int:
        """Images an optimizer update sees."""
        return self.options["batch_size"] * self.gpus * self.options.get("update_freq", 1)


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """The names `--recipe` knows, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_recipe(name: str, folder: Path = RECIPES) -> Recipe:
    """The recipe called `name` in `folder`, or the one in the file `name` (ends in .toml).

    Raises:
        UserError: no such recipe, unreadable file, a base that leads back to itself, a key or an
            option that is none, no batch_size, gpus or model, or a batch that is none.
    """
    path = file = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        known = recipe_names(folder)
        raise UserError(f"no recipe {name!r}{suggest(name, known)}; known are {', '.join(known)}")
    merged: dict[str, Any] = {"options": {}}
    seen: set[Path] = set()
    while True:  # from the recipe to its bases, which know what it does not say
        if path.resolve() in seen:
            raise UserError(f"recipe {file} has itself as a base, by way of {path}")
        seen.add(path.resolve())
        table = read_toml(path, "recipe")
        if unknown := table.keys() - {"base", "gpus", "options"}:
            names = ", ".join(sorted(unknown))
            raise UserError(f"recipe {path}: unknown {names}; known are base, gpus, options")
        options = table.get("options", {})
        if not isinstance(options, dict):
            raise UserError(f"recipe {path}: options is a table, not {options!r}")
        check_options(options, f"recipe {path}")
        merged = table | merged | {"options": options | merged["options"]}
        if "base" not in table:
            break
        path = path.parent / f"{table['base']}.toml"
    options = merged["options"]
    if missing := {"batch_size", "model"} - options.keys() | {"gpus"} - merged.keys():
        raise UserError(f"recipe {file} has no {', '.join(sorted(missing))}")
    recipe = Recipe(file.stem, merged["gpus"], options)
    for name in ("gpus", "batch_size", "update_freq"):  # that the global batch is made of
        value = recipe.gpus if name == "gpus" else options.get(name, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"recipe {file}: {name} is {value!r}, and must be a whole number >= 1")
    return recipe


def check_options(options: dict[str, Any], file: str) -> None:
    """Raise UserError, which names the `file`, if deit/main.py does not understand `options`."""
    parser = get_parser()
    try:
        parser.parse_args(options_to_argv(options, parser))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def options_to_argv(options: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """`options` as arguments for `parser`: {"lr": 3e-3, "compile": True} is --lr 0.003 --compile.

    Pairs, or a table, are written as key=value.

    Raises:
        UserError: `parser` has no such option.
    """
    known = parser._option_string_actions  # argparse has no public list of its options
    argv: list[str] = []
    for name, value in options.items():
        spellings = (f"--{name}", f"--{name.replace('_', '-')}")
        flag = next((spelling for spelling in spellings if spelling in known), None)
        if flag is None:
            names = [string.lstrip("-").replace("-", "_") for string in known]
            raise UserError(f"there is no option {name!r}{suggest(name, names)}")
        if isinstance(known[flag], Switch) and isinstance(value, bool):
            argv.append(flag if value else f"--no-{flag[2:]}")
            continue
        value = list(value.items()) if isinstance(value, dict) else value
        words = [_word(item) for item in (value if isinstance(value, list) else [value])]
        # A first word that begins with a dash would be taken for an option.
        joined = bool(words) and words[0].startswith("-")
        argv += [f"{flag}={words[0]}", *words[1:]] if joined else [flag, *words]
    return argv


def _word(value: Any) -> str:
    """A value on a command line; a pair as the `key=value` that `deit.cli.key_value` reads."""
    if not isinstance(value, tuple):
        return str(value)
    plain = f"{value[0]}={value[1]}"
    return plain if key_value(plain) == value else f"{value[0]}={value[1]!r}"


def split_batch(
    global_batch: int,
    processes: int,
    *,
    largest: int,
    batch_size: int | None = None,
    update_freq: int | None = None,
) -> tuple[int, int]:
    """(batch_size, update_freq) a process for `processes` with batch x processes x freq unchanged.

    `batch_size` and `update_freq` are the user's, where given; `largest` is the batch size that
    the recipe has shown to fit a GPU, and the fewest accumulation steps that respect it are taken.

    Raises:
        UserError: there is no such split; the message says which numbers of processes, or which
            batch sizes, would do.
    """
    total, share = f"a global batch of {global_batch}", global_batch // processes
    if global_batch % processes:
        fit = _divisors(global_batch)
        near = [n for n in fit if n < processes][-1:] + [n for n in fit if n > processes][:1]
        raise UserError(
            f"{total} cannot be split evenly over {processes} processes; "
            f"{' or '.join(map(str, near))} would do"
        )
    batches = _divisors(share)
    fit = [b for b in batches if batch_size in (None, b) and update_freq in (None, share // b)]
    if not fit:
        flags = {"--batch-size": batch_size, "--update-freq": update_freq}
        given = " x ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)
        raise UserError(
            f"{total} over {processes} processes is {share} each, which {given} does not divide: "
            f"either of the two may be one of {', '.join(map(str, batches))}"
        )
    chosen = max((b for b in fit if b <= largest), default=fit[0])
    return chosen, share // chosen


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
