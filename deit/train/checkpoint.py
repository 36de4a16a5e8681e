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
import os
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
from torch import Tensor, nn

from deit.errors import UserError, one_line
from deit.models.published import adapt_state

_SHOWN_KEYS = 3
_HUB_PREFIX = "hf-hub:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth")
# Where published files keep their weights, in order of preference.
_MODEL_KEYS = ("model", "state_dict")
# What deit/export.py writes into the metadata of safetensors, as JSON.
_EXPORTED_KEYS = ("args", "class_names")
_EMA_KEYS = ("model_ema", "state_dict_ema")


def _safe_globals() -> list[tuple[Any, str]]:
    """The types beyond torch's own that published checkpoints hold, as (type, pickled name).

    Paths of the other operating system are read as pure paths, which exist everywhere. Python
    3.13 pickles paths under `pathlib._local`, numpy 1 and 2 their scalars under different modules.
    """
    native = {"posix": ("PosixPath",), "nt": ("WindowsPath",)}.get(os.name, ())
    allowed: list[tuple[Any, str]] = [(argparse.Namespace, "argparse.Namespace")]
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            readable = name if name in native or name.startswith("Pure") else f"Pure{name}"
            allowed.append((getattr(pathlib, readable), f"{module}.{name}"))
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


def read_checkpoint(source: str | Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        source: a `.pth`/`.pt`/`.safetensors` file, an http(s) address (kept in torch.hub's
            cache), or `hf-hub:owner/name[@revision][/file]` on the Hugging Face hub.
        keys: other places than the usual ones where its weights may be.

    Returns:
        A dict that has at least one of the keys `model` and `model_ema` (or timm's `state_dict`),
        or of `keys`. Its `args`, which our files hold as a dict and published ones as a Namespace,
        are a Namespace if they are there.

    Raises:
        UserError: the file is missing, empty, damaged, refused as unsafe, or no checkpoint.
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
    if any(isinstance(content.get(key), Mapping) for key in (*keys, *_MODEL_KEYS, *_EMA_KEYS)):
        checkpoint = dict(content)
        if isinstance(checkpoint.get("args"), Mapping):
            checkpoint["args"] = argparse.Namespace(**checkpoint["args"])
        return checkpoint
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {"model": dict(content)}
    shown = ", ".join(repr(key) for key in list(content)[:_SHOWN_KEYS]) or "nothing"
    raise UserError(
        f"{text!r} is no checkpoint: it has neither a 'model' nor a bare state dict, it has {shown}"
    )


def _read_file(path: Path, source: str) -> Any:
    if not path.exists():
        raise UserError(f"no checkpoint at {source!r}: the file does not exist")
    if path.is_dir():
        raise UserError(f"{source!r} is a folder; give the checkpoint file itself")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {source!r} is empty (0 bytes): it was not written completely")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            from safetensors.torch import load_file

            with safe_open(path, "pt") as opened:
                said = opened.metadata() or {}
            state = load_file(path)
            try:
                saved = {key: json.loads(said[key]) for key in _EXPORTED_KEYS if key in said}
            except ValueError:
                return state
            # other files than those of deit/export.py have no such args
            return {"model": state, **saved} if isinstance(saved.get("args"), dict) else state
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about pickle protocols; an error follows if it matters
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"checkpoint {source!r} cannot be read: permission denied") from error
    except Exception as error:
        # Damaged bytes surface as nearly any exception: unpickling, zip, key, attribute, memory.
        raise UserError(_why_unreadable(path, source, error)) from error


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


def model_state(
    checkpoint: Mapping[str, Any],
    *,
    source: str | Path,
    ema: bool = False,
    keys: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The state dict to load from what `read_checkpoint` returned, prefixes stripped.

    Args:
        ema: take the averaged weights. Without them in the checkpoint this is an error, never a
            silent fall-back to the others.
        keys: where to look before the usual places.

    Raises:
        UserError: the checkpoint lacks these weights, or they are not tensors.
    """
    wanted = _EMA_KEYS if ema else (*keys, *_MODEL_KEYS)
    for key in wanted:
        state = checkpoint.get(key)
        if isinstance(state, Mapping):
            bad = [name for name, value in state.items() if not isinstance(value, Tensor)]
            if bad:
                raise UserError(
                    f"{str(source)!r}: '{key}' holds other things than tensors: {bad[0]!r} is a "
                    f"{type(state[bad[0]]).__name__}"
                )
            return strip_prefixes(state)
    present = ", ".join(repr(key) for key in checkpoint)
    other = next((key for key in (_MODEL_KEYS if ema else _EMA_KEYS) if key in checkpoint), None)
    way = "without --model-ema-eval, or ema=False" if ema else "with --model-ema-eval, or ema=True"
    hint = f"; its '{other}' is taken {way}" if other is not None else ""
    raise UserError(f"{str(source)!r} has no '{wanted[0]}' (it has {present}){hint}")


def load_model(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    trained_as: str | None = None,
) -> None:
    """Load `state` into `model`; every key must fit, by the published names or the model's own.

    Args:
        trained_as: the model name in the checkpoint's `args`, for the error message.

    Raises:
        UserError: with the numbers of missing, unexpected and misshapen keys and a few of each.
    """
    mismatched: list[str] = []
    missing: list[str] = []
    unexpected: list[str] = []
    state = adapt_state(state, model)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except ValueError as error:  # a model's own check, such as a different token order
        raise UserError(f"checkpoint {str(source)!r} does not fit: {one_line(error)}") from error
    except RuntimeError as error:
        mismatched = re.findall(r"size mismatch for ([^:\s]+):", str(error))
        if not mismatched:
            message = one_line(error)
            raise UserError(f"checkpoint {str(source)!r} does not fit: {message}") from error
        own = model.state_dict().keys()
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
    if not (missing or unexpected or mismatched):
        return
    parts = [
        _counted(len(missing), "missing key", missing),
        _counted(len(unexpected), "unexpected key", unexpected),
        _counted(len(mismatched), "tensor", mismatched, " of another shape"),
    ]
    origin = f"; it was saved from model {trained_as!r}" if trained_as else ""
    found = ", ".join(part for part in parts if part)
    raise UserError(
        f"checkpoint {str(source)!r} does not fit this {type(model).__name__}: {found}{origin}"
    )


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    *,
    source: str | Path,
    ema: bool = False,
    hint: str = "",
) -> None:
    """Load the trained weights of `checkpoint` into `model`, or with `ema` their average.

    Args:
        hint: what to add to the message if they do not fit.

    Raises:
        UserError: they are not there, or do not fit.
    """
    state = model_state(checkpoint, source=source, ema=ema)
    try:
        load_model(model, state, source=source, trained_as=trained_model_name(checkpoint))
    except UserError as error:
        raise UserError(f"{error}; {hint}" if hint else str(error)) from error


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UserError if a value in `state` is infinite or NaN."""
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise UserError(
            f"{str(source)!r} has weights that are infinite or NaN, in "
            f"{_counted(len(bad), 'tensor', bad)}: that training had diverged; take an earlier "
            "checkpoint"
        )


def has_average(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the average of the weights is in it."""
    return any(isinstance(checkpoint.get(key), Mapping) for key in _EMA_KEYS)


def raw_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The trained weights as they are in the file, with all prefixes; empty if there are none."""
    states = (checkpoint.get(key) for key in _MODEL_KEYS)
    return next((state for state in states if isinstance(state, Mapping)), {})


def which_weights(checkpoint: Mapping[str, Any], ema: bool = False) -> str:
    """In words, which of a checkpoint's weights are taken."""
    if ema:
        return "the average of the weights (model_ema)"
    other = ", not their average" if has_average(checkpoint) else ""
    return f"the trained weights (model){other}"


def _counted(count: int, noun: str, names: list[str], suffix: str = "") -> str:
    if not count:
        return ""
    shown = ", ".join(names[:_SHOWN_KEYS]) + (", ..." if count > _SHOWN_KEYS else "")
    return f"{count} {noun}{'' if count == 1 else 's'}{suffix} ({shown})"


def trained_model_name(checkpoint: Mapping[str, Any]) -> str | None:
    """The `--model` of the run that wrote `checkpoint`, if it says so."""
    name = getattr(checkpoint.get("args"), "model", None)
    return name if isinstance(name, str) else None
