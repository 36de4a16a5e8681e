"""Reading checkpoints: every format that is in use, and none that runs code."""

import argparse
import functools
import http.server
import io
import os
import pathlib
import pickle
import threading
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from deit.errors import UserError
from deit.train.checkpoint import Checkpoint, plain_name, read_checkpoint


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def assert_same(state, net):
    own = net.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], value) for key, value in own.items())


def published(net, prefix: str = "") -> dict:
    state = {prefix + key: value for key, value in net.state_dict().items()}
    args = {"model": "a_net", "output_dir": pathlib.PosixPath("/data/run"), "acc": np.float32(81)}
    return {
        "model": state,
        "model_ema": {key: value + 1 for key, value in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"base_values": [np.float64(0.1)]},
        "epoch": 399,
        "scaler": {},
        "args": argparse.Namespace(**args),
    }


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_published_format(net, tmp_path, prefix, save):
    save(published(net, prefix), tmp_path / "c.pth")
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert checkpoint["epoch"] == 399
    assert str(checkpoint["args"].output_dir) == "/data/run"
    assert checkpoint.options["model"] == "a_net"
    assert_same(checkpoint.state(), net)
    assert torch.equal(checkpoint.state(ema=True)["0.weight"], net[0].weight + 1)


@pytest.mark.parametrize(
    ("module", "name"), [("pathlib._local", "PosixPath"), ("pathlib", "WindowsPath")]
)
def test_paths_of_other_pythons_and_systems(module, name, tmp_path):
    """Python 3.13 pickles paths as pathlib._local.PosixPath, Windows as WindowsPath."""
    content = {"model": {"w": torch.ones(2)}, "args": pathlib.PosixPath("/a/b")}
    torch.save(content, tmp_path / "c.pth")
    own = f"c{pathlib.PosixPath.__module__}\nPosixPath\n".encode()
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as old,
        zipfile.ZipFile(tmp_path / "d.pth", "w") as new,
    ):
        for member in old.namelist():
            data = old.read(member).replace(own, f"c{module}\n{name}\n".encode())
            new.writestr(member, data)
    assert read_checkpoint(tmp_path / "d.pth")["args"].name == "b"


def test_address_is_downloaded_once(net, tmp_path, monkeypatch):
    torch.save(published(net), tmp_path / "checkpoint.pth")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for _ in range(2):
            assert_same(read_checkpoint(f"{address}/checkpoint.pth?version=2").state(), net)
        assert len(requests) == 1
        with pytest.raises(UserError, match=r"cannot download.*absent.*404"):
            read_checkpoint(f"{address}/absent.pth")
        server.shutdown()


def test_hugging_face_names(net, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if repository == "far/away":
            raise LocalEntryNotFoundError("check your connection")
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same(read_checkpoint("hf-hub:owner/some.net@v1").state(), net)
    read_checkpoint("hf-hub:owner/some.net/pytorch_model.bin")
    assert asked == [
        ("owner/some.net", "model.safetensors", "v1"),
        ("owner/some.net", "pytorch_model.bin", "v1"),
        ("owner/some.net", "pytorch_model.bin", None),
    ]
    for name, words in (
        ("owner/net/x.pth", r"no file named x\.pth"),
        ("far/away", "cannot download .*: check your connection"),
        ("nobody", "not of the form"),
    ):
        with pytest.raises(UserError, match=words):
            read_checkpoint(f"hf-hub:{name}")


class Payload:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def bare(protocol):
    return lambda content, path: path.write_bytes(pickle.dumps(content["args"], protocol))


@pytest.mark.parametrize("save", [torch.save, save_legacy, bare(2), bare(4)])
@pytest.mark.parametrize("function", [os.system, eval])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, save, function):
    mark, file = tmp_path / "was_here", tmp_path / "c.pth"
    command = f"touch {mark}" if function is os.system else f"open('{mark}', 'w')"
    save({"model": {"w": torch.ones(2)}, "args": Payload(function, command)}, file)
    with pytest.raises(UserError, match=r"^refused to load .*; nothing of it was run$"):
        read_checkpoint(file)
    assert not mark.exists()
    # The same file does its work when it is loaded carelessly: the payload is a real one.
    if save in (torch.save, save_legacy):
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert mark.exists()


def saved(content) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "does not exist"),
        ("", None, "folder"),
        ("empty.pth", b"", r"is empty \(0 bytes\)"),
        ("cut.pth", saved({"model": {"w": torch.ones(99)}})[:500], "truncated"),
        ("cut.safetensors", b"\x08\0\0", "truncated"),
        ("text.pth", b"<html>not found</html>", "no checkpoint"),
        ("list.pth", saved([1, 2]), "holds a list"),
        ("foreign.pth", saved({"a": 3, "b": 1.0}), "neither a 'model' nor .*, it has 'a', 'b'"),
        ("strings.pth", saved({"model": {"w": "a string"}}), "'w' is a str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_files(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        read_checkpoint(tmp_path / name).state()


def test_absent_average_is_an_error(net):
    with pytest.raises(UserError, match=r"no 'model_ema'.*--model-ema-eval"):
        Checkpoint({"model": net.state_dict()}, "c.pth").state(ema=True)
    taken = (
        r"no 'model' .*'model_ema' is taken by --finetune with --model-key model_ema, .*ema=True"
    )
    with pytest.raises(UserError, match=taken):
        Checkpoint({"state_dict_ema": net.state_dict()}, "c.pth").state()


def test_other_names_keep_what_looks_like_a_prefix():
    assert plain_name("module_list.0") == "module_list.0"
    assert plain_name("blocks.0._orig_mod.w") == "blocks.0.w"
