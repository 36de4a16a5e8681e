"""Run docs/tour.py and write docs/tour.md: its text, its code, and what each cell printed.

    python docs/render.py                # from the repository root

`# %% [markdown]` opens a cell of text in comments, `# %%` one of code.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deit.cli import CommandLine
from deit.errors import one_line_errors

FOLDER = Path(__file__).resolve().parent
MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells(script: str) -> list[tuple[bool, str]]:
    """(is text, content) of every cell; text without its comment signs."""
    parts = MARK.split(script)[1:]
    found = []
    for mark, content in zip(parts[::2], parts[1::2], strict=True):
        content = content.strip("\n")
        if mark:
            content = "\n".join(
                line.removeprefix("#").removeprefix(" ") for line in content.splitlines()
            )
        found.append((bool(mark), content))
    return found


def render(script: str) -> str:
    """The page. Cells of code share one namespace, as in a notebook."""
    blocks = []
    namespace = {"__name__": "__main__"}
    for is_text, content in cells(script):
        if is_text:
            blocks.append(content)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(content, "tour.py", "exec"), namespace)
        blocks.append(f"```python\n{content}\n```")
        if printed.getvalue().strip():
            blocks.append(f"```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    CommandLine(description=__doc__.splitlines()[0]).parse_args()
    page = render((FOLDER / "tour.py").read_text(encoding="utf-8"))
    (FOLDER / "tour.md").write_text(page, encoding="utf-8")
    print(f"wrote {FOLDER / 'tour.md'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
