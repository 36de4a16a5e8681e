"""Reading checkpoints of any origin, without ever running code that a file brings along.

A checkpoint is a dict with `model` and, optionally, `model_ema`, `optimizer`, `lr_scheduler`,
`epoch`, `scaler`, `args`, and what `deit.train.resume` adds. A file that holds a bare state dict
(every safetensors file does) is read as `{"model": state dict}`.

Pickles are opened with torch's `weights_only` unpickler, which builds tensors and plain containers
and refuses every other name, except the few harmless types listed in `_SAFE_GLOBALS`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deit.errors import UserError, one_line

_SHOWN = 3
_HUB_PREFIX = "hf-hub:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth")
# Where published files keep their weights, in order of preference.
_MODEL_KEYS = ("model", "state_dict")
# What deit/export.py writes into the metadata of safetensors, as JSON.
_EXPORTED_KEYS = ("args", "class_names")
_EMA_KEYS = ("model_ema", "state_dict_ema")


def _safe_globals() -> list[tuple[Any, str]]:
    """The types beyond torch's own that published checkpoints hold, as (type, pickled name).

    Paths are read as pure paths, which exist on every system. Python 3.13 pickles them under
    `pathlib._local`, numpy 1 and 2 their scalars under different modules.
    """
    allowed: list[tuple[Any, str]] = [(argparse.Namespace, "argparse.Namespace")]
    for module in ("pathlib", "pathlib._local"):
        for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
            name = pure.__name__
            allowed += [(pure, f"{module}.{n}") for n in (name, name.removeprefix("Pure"))]
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed.append((multiarray.scalar, f"{module}.scalar"))
        allowed.append((multiarray._reconstruct, f"{module}._reconstruct"))
    allowed += [(np.dtype, "numpy.dtype"), (np.ndarray, "numpy.ndarray")]
    # The unpickler also asks for the class of each dtype that it restores.
    kinds = [np.dtype(kind) for kind in "?bBhHiIlLqQefd"]
    allowed += [(type(kind), f"numpy.dtypes.{type(kind).__name__}") for kind in kinds]
    return allowed


_SAFE_GLOBALS = _safe_globals()


class Checkpoint(dict[str, Any]):
    """What a checkpoint holds, under its keys; messages call it by its `source`."""

    def __init__(self, content: Mapping[str, Any], source: str | Path) -> None:
        super().__init__(content)
        self.source = str(source)
        self._states: dict[bool, dict[str, Tensor]] = {}

    @property
    def model_name(self) -> str | None:
        """The `--model` of the run that wrote it, if it says so."""
        name = getattr(self.get("args"), "model", None)
        return name if isinstance(name, str) else None

    @property
    def class_names(self) -> list[str]:
        """What the network's outputs stand for, in their order; empty if it does not say so."""
        return list(self.get("class_names") or ())

    @property
    def has_average(self) -> bool:
        """Whether the average of the weights is in it."""
        return any(isinstance(self.get(key), Mapping) for key in _EMA_KEYS)

    @property
    def raw_state(self) -> Mapping[str, Tensor]:
        """The trained weights with all prefixes of their names; empty if there are none."""
        states = (self.get(key) for key in _MODEL_KEYS)
        return next((state for state in states if isinstance(state, Mapping)), {})

    def state(self, ema: bool = False) -> dict[str, Tensor]:
        """The state dict of the trained weights, or with `ema` of their average, no prefixes.

        Raises:
            UserError: these weights are not in it (the others are never taken in their place), or
                are infinite or NaN.
        """
        if ema not in self._states:
            state = self._states[ema] = self._find(_EMA_KEYS if ema else _MODEL_KEYS)
            bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
            if bad:
                raise UserError(
                    f"{self.source!r} has weights that are infinite or NaN, in "
                    f"{counted(bad, 'tensor')}: that training had diverged; take an earlier "
                    "checkpoint"
                )
        return self._states[ema]

    def narrow(self, key: str, prefix: str) -> None:
        """Have as trained weights those under `key` (`a|b`: the first that is there) whose names
        begin with `prefix`, without it.

        Raises:
            UserError: there are none.
        """
        state = self._find((*(key.split("|") if key else ()), *_MODEL_KEYS))
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if not state:
            raise UserError(f"{self.source!r} has no weights whose names begin with {prefix!r}")
        self["model"] = state

    def _find(self, keys: Sequence[str]) -> dict[str, Tensor]:
        found = next((key for key in keys if isinstance(self.get(key), Mapping)), None)
        if found is None:
            ema = keys is _EMA_KEYS
            present = ", ".join(repr(key) for key in self)
            other = next((key for key in (_MODEL_KEYS if ema else _EMA_KEYS) if key in self), None)
            word = "without" if ema else "with"
            hint = f"; its '{other}' is taken {word} --model-ema-eval, or ema={not ema}"
            raise UserError(
                f"{self.source!r} has no '{keys[0]}' (it has {present}){hint if other else ''}"
            )
        for name, value in self[found].items():
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{self.source!r}: '{found}' holds other things than tensors: {name!r} is a "
                    f"{type(value).__name__}"
                )
        return strip_prefixes(self[found])

    def which(self, ema: bool = False) -> str:
        """In words, which of its weights are taken."""
        if ema:
            return "the average of the weights (model_ema)"
        return "the trained weights (model)" + (", not their average" if self.has_average else "")


def read_checkpoint(source: str | Path, *, key: str = "", prefix: str = "") -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        source: a `.pth`/`.pt`/`.safetensors` file, an http(s) address (kept in torch.hub's
            cache), or `hf-hub:owner/name[@revision][/file]` on the Hugging Face hub.
        key: where its weights are (`model|module`: the first that is there), before the usual
            places.
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
    known = (*key.split("|"), *_MODEL_KEYS, *_EMA_KEYS)
    if any(isinstance(content.get(name), Mapping) for name in known):
        checkpoint = Checkpoint(content, text)
    elif content and all(isinstance(value, Tensor) for value in content.values()):
        checkpoint = Checkpoint({"model": dict(content)}, text)
    else:
        shown = ", ".join(repr(name) for name in list(content)[:_SHOWN]) or "nothing"
        raise UserError(
            f"{text!r} is no checkpoint: it has neither a 'model' nor a bare state dict, it has "
            f"{shown}"
        )
    if isinstance(checkpoint.get("args"), Mapping):
        checkpoint["args"] = argparse.Namespace(**checkpoint["args"])
    if key or prefix:
        checkpoint.narrow(key, prefix)
    return checkpoint


def _read_file(path: Path, source: str) -> Any:
    if not path.exists():
        raise UserError(f"no checkpoint at {source!r}: the file does not exist")
    if path.is_dir():
        raise UserError(f"{source!r} is a folder; give the checkpoint file itself")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {source!r} is empty (0 bytes): it was not written completely")
    try:
        if path.suffix == ".safetensors":
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
    message = one_line(error)
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"(?:unsupported GLOBAL|GLOBAL) ([\w.]+)", message)
        if name and not name.group(1).startswith("torch.distributed"):
            return (
                f"refused to load {source!r}: it wants to use {name.group(1)!r}, which is not "
                "among the types that a checkpoint needs; nothing of it was run"
            )
        if "unrecognized function" in message:
            return f"refused to load {source!r}: it wants to call a function; nothing of it was run"
        message = "not a pickle of plain weights"  # torch's own text is advice to its users
    with path.open("rb") as file:
        starts_as_zip = file.read(2) == b"PK"
    if path.suffix == ".safetensors" or (starts_as_zip and not zipfile.is_zipfile(path)):
        return f"checkpoint {source!r} is truncated or damaged ({path.stat().st_size} bytes)"
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
    from huggingface_hub.errors import EntryNotFoundError

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
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client raises its HTTP library's errors
            raise UserError(f"cannot download {source!r}: {one_line(error)[:200]}") from error
    raise UserError(f"{source!r} has no file named {' or '.join(candidates)}")


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo what `torch.compile` (`_orig_mod.`) and DDP (`module.`) put before and into the keys."""
    stripped = {}
    for key, value in state.items():
        name = key.replace("._orig_mod.", ".")
        while name.startswith(("_orig_mod.", "module.")):
            name = name.split(".", 1)[1]
        stripped[name] = value
    return stripped


def some(names: Sequence[str]) -> str:
    """The first of `names`."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def counted(names: Sequence[str], noun: str, suffix: str = "") -> str:
    """`2 missing keys (a, b)`; empty without names."""
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} {noun}{plural}{suffix} ({some(names)})" if names else ""
