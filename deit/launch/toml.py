"""Reading TOML: recipes and the cluster file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deit.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table in `path`; `what` names the file in the `UserError` of an unreadable one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} {path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from None


def check_keys(table: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse keys that nobody reads: a misspelt one must not be ignored."""
    unknown = sorted(set(table) - known)
    if unknown:
        raise UserError(
            f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
