"""Reading checkpoints: every format that is in use, and none that runs code."""

import argparse
import functools
import http.server
import os
import pathlib
import pickle
import subprocess
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deit.errors import UserError
from deit.train.checkpoint import Checkpoint, plain_name, read_checkpoint
from deit.train.weights import load_weights


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def assert_same(state, net):
    own = net.state_dict()
    assert state.keys() == own.keys()
    for key, value in own.items():
        assert torch.equal(state[key], value), key


def published(net, prefix: str = "") -> dict:
    state = {prefix + key: value for key, value in net.state_dict().items()}
    return {
        "model": state,
        "model_ema": {key: value + 1 for key, value in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"base_values": [np.float64(0.1)]},
        "epoch": 399,
        "scaler": {},
        "args": argparse.Namespace(
            model="a_net", output_dir=pathlib.PosixPath("/data/run"), acc=np.float32(81.0)
        ),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_published_format(net, tmp_path, prefix, legacy):
    content = published(net, prefix)
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert checkpoint["epoch"] == 399
    assert str(checkpoint["args"].output_dir) == "/data/run"
    assert checkpoint.options["model"] == "a_net"
    assert_same(checkpoint.state(), net)
    assert torch.equal(checkpoint.state(ema=True)["0.weight"], net[0].weight + 1)


def test_paths_of_other_pythons_and_systems(tmp_path):
    """Python 3.13 pickles paths as pathlib._local.PosixPath, Windows as WindowsPath."""
    for module, name in [("pathlib._local", "PosixPath"), ("pathlib", "WindowsPath")]:
        content = {"model": {"w": torch.ones(2)}, "args": pathlib.PosixPath("/a/b")}
        torch.save(content, tmp_path / "c.pth")
        with zipfile.ZipFile(tmp_path / "c.pth") as old:
            members = {member: old.read(member) for member in old.namelist()}
        with zipfile.ZipFile(tmp_path / "d.pth", "w") as new:
            for member, data in members.items():
                own = pathlib.PosixPath.__module__.encode()
                data = data.replace(b"c" + own + b"\nPosixPath\n", f"c{module}\n{name}\n".encode())
                new.writestr(member, data)
        path = read_checkpoint(tmp_path / "d.pth")["args"]
        assert path.name == "b", path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bare_state_dict(net, tmp_path, suffix):
    file = tmp_path / f"c{suffix}"
    if suffix == ".pth":
        torch.save(net.state_dict(), file)
    else:
        save_file(net.state_dict(), file)
    assert_same(read_checkpoint(file).state(), net)


def test_address_is_downloaded_once(net, tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    torch.save(published(net), tmp_path / "served" / "checkpoint.pth")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "served")
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        for _ in range(2):
            checkpoint = read_checkpoint(f"{address}/checkpoint.pth?version=2")
            assert_same(checkpoint.state(), net)
        assert len(requests) == 1
        with pytest.raises(UserError, match=r"cannot download.*absent.*404"):
            read_checkpoint(f"{address}/absent.pth")
    finally:
        server.shutdown()


def test_hugging_face_names(net, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same(read_checkpoint("hf-hub:owner/some.net@v1").state(), net)
    assert asked == [
        ("owner/some.net", "model.safetensors", "v1"),
        ("owner/some.net", "pytorch_model.bin", "v1"),
    ]
    read_checkpoint("hf-hub:owner/some.net/pytorch_model.bin")
    assert asked[-1] == ("owner/some.net", "pytorch_model.bin", None)
    with pytest.raises(UserError, match=r"no file named x\.pth"):
        read_checkpoint("hf-hub:owner/net/x.pth")
    with pytest.raises(UserError, match="not of the form"):
        read_checkpoint("hf-hub:nobody")


class Payload:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function", ["system", "eval", "popen"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, legacy, function):
    mark = tmp_path / "was_here"
    command = ["touch", str(mark)]
    payload = {
        "system": Payload(os.system, " ".join(command)),
        "eval": Payload(eval, f"open('{mark}', 'w')"),
        "popen": Payload(subprocess.Popen, command),
    }[function]
    content = {"model": {"w": torch.ones(2)}, "args": payload}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="refused to load") as caught:
        read_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    # The same file does its work when it is loaded carelessly: the payload is a real one.
    result = torch.load(tmp_path / "c.pth", weights_only=False)["args"]
    if function == "popen":
        result.wait()
    assert mark.exists()


def test_plain_malicious_pickle(tmp_path):
    for protocol in (2, 4):
        (tmp_path / "c.pth").write_bytes(pickle.dumps(Payload(os.system, "true"), protocol))
        with pytest.raises(UserError, match=r"^refused to load .*nothing of it was run$"):
            read_checkpoint(tmp_path / "c.pth")


def test_unusable_files(net, tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(published(net), whole)
    data = whole.read_bytes()
    (tmp_path / "empty.pth").touch()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3, "best": 1.0}, tmp_path / "foreign.pth")
    torch.save({"model": {"w": "a string"}}, tmp_path / "strings.pth")
    expected = {
        "missing.pth": "does not exist",
        "": "folder",
        "empty.pth": "empty",
        "cut.pth": "truncated",
        "cut.safetensors": "truncated",
        "text.pth": "no checkpoint",
        "list.pth": "holds a list",
        "foreign.pth": "neither a 'model' nor a bare state dict, it has 'epoch', 'best'",
        "strings.pth": "'w' is a str",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            read_checkpoint(tmp_path / name).state()
        assert "\n" not in str(caught.value)


def test_absent_average_is_an_error(net):
    with pytest.raises(UserError, match=r"no 'model_ema'.*--model-ema-eval"):
        Checkpoint({"model": net.state_dict()}, "c.pth").state(ema=True)
    with pytest.raises(UserError, match=r"no 'model' .*'model_ema' is taken with .*ema=True"):
        Checkpoint({"model_ema": net.state_dict()}, "c.pth").state()


def test_foreign_keys_are_counted(net):
    state = {f"other.{n}": torch.ones(1) for n in range(5)}
    state["1.weight"] = net[1].weight
    content = {"model": state, "args": argparse.Namespace(model="a_net")}
    with pytest.raises(UserError) as caught:
        load_weights(net, Checkpoint(content, "c.pth"))
    message = str(caught.value)
    assert "3 missing keys (0.weight, 0.bias, 1.bias)" in message
    assert "5 unexpected keys (other.0, other.1, other.2, ...)" in message
    assert "'a_net'" in message
    assert "\n" not in message


def test_other_shapes_are_counted(net):
    state = {key: value[:-1] for key, value in net.state_dict().items()}
    with pytest.raises(
        UserError, match=r"4 tensors of another shape \(0.weight 2x4 and not 3x4, 0.bias"
    ):
        load_weights(net, Checkpoint({"model": state}, "c.pth"))


def test_other_names_keep_what_looks_like_a_prefix():
    assert plain_name("module_list.0") == "module_list.0"
    assert plain_name("blocks.0._orig_mod.w") == "blocks.0.w"
