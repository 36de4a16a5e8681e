"""Reading checkpoints of any origin, without ever running code that a file brings along.

A checkpoint is a dict with `model` and, optionally, `model_ema`, `optimizer`, `lr_scheduler`,
`epoch`, `scaler`, `args`, and what `deit.train.resume` adds. A file that holds a bare state dict
(every safetensors file does) is read as `{"model": state dict}`.

Pickles are opened with torch's `weights_only` unpickler, which builds tensors and plain containers
and refuses every other name, except the few harmless types listed in `_SAFE_GLOBALS`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deit.errors import UserError, one_line, some
from deit.train.args import config_dict

_HUB_PREFIX = "hf-hub:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth")
# What timm's own training script calls what the published files have.
_TIMMS_NAMES = {"model": "state_dict", "model_ema": "state_dict_ema", "scaler": "amp_scaler"}
_TAKEN = {
    "model": "without --model-ema-eval or ema=True",
    "model_ema": "by --finetune with --model-key model_ema, by --eval, export.py and predict.py "
    "with --model-ema-eval, by deit.load with ema=True",
}
# What deit/export.py writes into the metadata of safetensors, as JSON.
_EXPORTED_KEYS = ("args", "class_names")

# The types beyond torch's own that published checkpoints hold, some under other names than here:
# paths are read as pure paths, which exist on every system, and Python 3.13 pickles them under
# `pathlib._local`; numpy 1 and 2 have different modules. The unpickler also asks for the class of
# each dtype that it restores.
_multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
    *(
        (getattr(_multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
        for name in (pure.__name__, pure.__name__.removeprefix("Pure"))
    ),
]


class Checkpoint(dict[str, Any]):
    """What a checkpoint holds, under the published names; messages call it by its `source`.

    Attributes:
        key: where in the file the weights were that are now `model`.
    """

    def __init__(self, content: Mapping[str, Any], source: str | Path) -> None:
        super().__init__(content)
        self.source, self.key = str(source), "model"
        for name, timms in _TIMMS_NAMES.items():
            if isinstance(self.get(timms), Mapping) and not isinstance(self.get(name), Mapping):
                self[name] = self[timms]

    @property
    def options(self) -> dict[str, Any]:
        """Those of the run that wrote it, as plain values; empty if it does not say them."""
        args = self.get("args")
        return config_dict(args) if isinstance(args, argparse.Namespace | Mapping) else {}

    @property
    def class_names(self) -> list[str]:
        """What the network's outputs stand for, in their order; empty if it does not say so."""
        names = self.get("class_names") or []
        if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise UserError(f"{self.source!r} is damaged: its class_names are no list of strings")
        return list(names)

    @property
    def present(self) -> str:
        """The names of what is in it, for a message."""
        return ", ".join(repr(name) for name in self)

    @property
    def has_average(self) -> bool:
        """Whether the average of the weights is in it."""
        return isinstance(self.get("model_ema"), Mapping)

    def state(self, ema: bool = False) -> dict[str, Tensor]:
        """The state dict of the trained weights, or with `ema` of their average, no prefixes.

        Raises:
            UserError: these weights are not in it (the others are never taken in their place).
        """
        key, other = ("model_ema", "model") if ema else ("model", "model_ema")
        if not isinstance(self.get(key), Mapping):
            hint = ""
            if other in self:
                hint = f"; its '{other}' is taken {_TAKEN[other]}"
            raise UserError(f"{self.source!r} has no '{key}' (it has {self.present}){hint}")
        for name, value in self[key].items():
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{self.source!r}: '{key}' holds other things than tensors: {name!r} is a "
                    f"{type(value).__name__}"
                )
        return {plain_name(name): value for name, value in self[key].items()}

    def which(self, ema: bool = False) -> str:
        """In words, which of its weights are taken."""
        if ema or self.key == "model_ema":
            return "the average of the weights (model_ema)"
        other = ", not their average" if self.has_average else ""
        return f"the trained weights ({self.key}){other}"


def entries_as_expected(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a `function` of something and a checkpoint: entries of other kinds are one clear error.

    What may be in a damaged file is more than can be looked at entry by entry.
    """

    @functools.wraps(function)
    def checked(target: Any, checkpoint: Checkpoint, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(target, checkpoint, *args, **kwargs)
        except UserError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {one_line(error)[:120]}"
            raise UserError(
                f"{checkpoint.source!r} is damaged or not of this program ({what})"
            ) from error

    return checked


def read_checkpoint(source: str | Path, *, key: str = "", prefix: str = "") -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        source: a `.pth`/`.pt`/`.safetensors` file, an http(s) address (kept in torch.hub's
            cache), or `hf-hub:owner/name[@revision][/file]` on the Hugging Face hub.
        key: where its weights are (`model|module`: the first that is there). A bare state dict
            is taken whole nevertheless, as the published code does.
        prefix: take only the weights whose names begin with it, and cut it off.

    Returns:
        At least one of the keys `model` and `model_ema` (or timm's `state_dict`), or of `key`, is
        in it. With `key` or `prefix` `model` has the weights that are meant. Its `args`, which our
        files hold as a dict and published ones as a Namespace, are a Namespace if they are there.

    Raises:
        UserError: the file is missing, empty, damaged, refused as unsafe, or no checkpoint, or has
            no such weights.
    """
    text = str(source)
    if text.startswith(_HUB_PREFIX):
        path = _from_hugging_face(text)
    elif text.startswith(("http://", "https://")):
        path = _from_address(text)
    else:
        path = Path(text).expanduser()
    content = _read_file(path, text)
    if not isinstance(content, Mapping):
        raise UserError(f"{text!r} holds a {type(content).__name__}, not a checkpoint")
    checkpoint = Checkpoint(content, text)
    named = [name for name in key.split("|") if isinstance(checkpoint.get(name), Mapping)]
    if named:
        checkpoint["model"], checkpoint.key = checkpoint[named[0]], named[0]
    elif not any(isinstance(checkpoint.get(name), Mapping) for name in ("model", "model_ema")):
        if not content or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(
                f"{text!r} is no checkpoint: it has neither a 'model' nor a bare state dict, it "
                f"has {some([repr(name) for name in content]) or 'nothing'}"
            )
        checkpoint = Checkpoint({"model": content}, text)
    elif key:
        raise UserError(f"{text!r} has no {key!r} (it has {checkpoint.present})")
    if key or prefix:
        state = checkpoint.state()
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if not state:
            raise UserError(f"{text!r} has no weights whose names begin with {prefix!r}")
        checkpoint["model"] = state
    return checkpoint


def _read_file(path: Path, source: str) -> Any:
    if not path.exists():
        raise UserError(f"no checkpoint at {source!r}: the file does not exist")
    if path.is_dir():
        raise UserError(f"{source!r} is a folder; give the checkpoint file itself")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {source!r} is empty (0 bytes): it was not written completely")
    try:
        if path.suffix.lower() == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            # about pickle protocols; an error follows if it matters
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"checkpoint {source!r} cannot be read: permission denied") from error
    except Exception as error:
        # Damaged bytes surface as nearly any exception: unpickling, zip, key, attribute, memory.
        raise UserError(_why_unreadable(path, source, error)) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The weights, beside `args` and `class_names` if deit/export.py wrote the file."""
    with safe_open(path, "pt") as opened:
        said = opened.metadata() or {}
    state = load_file(path)
    try:
        saved = {key: json.loads(said[key]) for key in _EXPORTED_KEYS if key in said}
    except ValueError:
        return state
    return {"model": state, **saved} if isinstance(saved.get("args"), dict) else state


def _why_unreadable(path: Path, source: str, error: Exception) -> str:
    """One line for a file that did not load: refused, cut short, or no checkpoint at all."""
    with path.open("rb") as file:
        start = file.read(2)
    zipped = start == b"PK"
    if path.suffix.lower() == ".safetensors" or (zipped and not zipfile.is_zipfile(path)):
        return f"checkpoint {source!r} is truncated or damaged ({path.stat().st_size} bytes)"
    message = one_line(error)
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL ([\w.]+)", message)
        wants = ""
        if name:
            wants = f"to use {name[1]!r}, which is not among the types that a checkpoint needs"
        elif "unrecognized function" in message:
            wants = "to call a function"
        elif "Unsupported operand" in message and (zipped or start[:1] == pickle.PROTO):
            wants = "more of the unpickler than plain weights need"
        if wants:
            return f"refused to load {source!r}: it wants {wants}; nothing of it was run"
        message = "not a pickle of plain weights"  # torch's own text is advice to its users
    return f"{source!r} is damaged or no checkpoint ({type(error).__name__}: {message[:120]})"


def _from_address(url: str) -> Path:
    """Download `url` once into torch.hub's cache and return the file.

    The name carries a digest of the whole address, because many published files share the name
    `checkpoint.pth`.
    """
    name = Path(urlparse(url).path).name or "checkpoint.pth"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Writes to a temporary name and renames, so that parallel processes do not clash.
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:  # urllib's errors are OSErrors
            raise UserError(f"cannot download {url!r}: {one_line(error)}") from error
    return path


def _from_hugging_face(source: str) -> Path:
    """The local copy of `hf-hub:owner/name[@revision][/file]`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    match = re.fullmatch(
        r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", source.removeprefix(_HUB_PREFIX)
    )
    if match is None:
        raise UserError(f"{source!r} is not of the form 'hf-hub:owner/name[@revision][/file]'")
    repository, revision, file = match.groups()
    candidates = (file,) if file else _HUB_FILES
    for candidate in candidates:
        try:
            return Path(hf_hub_download(repository, candidate, revision=revision))
        except Exception as error:  # the hub's client raises its HTTP library's errors
            absent = isinstance(error, EntryNotFoundError)
            if absent and not isinstance(error, LocalEntryNotFoundError):  # the hub was not reached
                continue
            raise UserError(f"cannot download {source!r}: {one_line(error)[:200]}") from error
    raise UserError(f"{source!r} has no file named {' or '.join(candidates)}")


def plain_name(key: str) -> str:
    """Undo what `torch.compile` (`_orig_mod.`) and DDP (`module.`) put before and into a key."""
    key = key.replace("._orig_mod.", ".")
    while key.startswith(("_orig_mod.", "module.")):
        key = key.split(".", 1)[1]
    return key


def counted(names: Sequence[str], noun: str, suffix: str = "") -> str:
    """`2 missing keys (a, b)`; empty without names."""
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} {noun}{plural}{suffix} ({some(names)})" if names else ""
