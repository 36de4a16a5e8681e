"""`deit/export.py`: files that hold the network, checked in their own runtimes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import deit
from deit.deploy import files
from deit.deploy.info import NetworkInfo
from deit.errors import UserError
from deit.export import main
from deit.train.checkpoint import read_checkpoint

KWARGS = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
SMALL = ("--model", "d2_deit_tiny_patch16_LS", "--model-kwargs",
         *(f"{key}={value}" for key, value in KWARGS.items()))  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    import timm

    model = timm.create_model("d2_deit_tiny_patch16_LS", img_size=16, num_classes=3, **KWARGS)
    args = {"model": "d2_deit_tiny_patch16_LS", "input_size": 16, "eval_crop_ratio": 0.9,
            "model_kwargs": [list(pair) for pair in KWARGS.items()]}  # fmt: skip
    saved = {"model": model.state_dict(), "args": args, "class_names": ["a", "b", "é"]}
    torch.save(saved, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


@pytest.mark.parametrize("options", [(), ("--no-fold", "--half"), ("--normalize-input",)])
def test_onnx(checkpoint, tmp_path, capsys, options):
    pytest.importorskip("onnxscript")
    output = tmp_path / "network.onnx"
    argv = ["--resume", str(checkpoint), "--format", "onnx", "--output", str(output)]
    assert main([*argv, "--dynamic-batch", *options]) == 0
    assert "greatest difference from the network" in capsys.readouterr().out
    network = files.OnnxNetwork(output)
    assert network.batch is None
    info = NetworkInfo.from_metadata(network.metadata)
    assert info.class_names == ("a", "b", "é")
    assert (info.input_size, info.crop_ratio) == ((16, 16), 0.9)
    assert info.normalized == ("--normalize-input" not in options)
    images = torch.rand(5, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    expected = deit.load(checkpoint)(images if info.normalized else (images - mean) / std)
    tolerance = 2e-2 if "--half" in options else 1e-4
    torch.testing.assert_close(network(images), expected, rtol=tolerance, atol=tolerance)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_torch_export_with_a_fixed_batch(tmp_path):
    output = tmp_path / "network.pt2"
    argv = [*SMALL, "--input-size", "16", "24", "--nb-classes", "4", "--batch-size", "3"]
    assert main([*argv, "--format", "torch-export", "--output", str(output)]) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(output, extra_files=extra).module()
    assert program(torch.zeros(3, 3, 16, 24)).shape == (3, 4)
    assert NetworkInfo.from_metadata(json.loads(extra["metadata.json"])).input_size == (16, 24)


def test_safetensors_hold_the_networks_own_weights(checkpoint, tmp_path):
    output = tmp_path / "network.safetensors"
    argv = ["--resume", str(checkpoint), "--format", "safetensors", "--output", str(output)]
    assert main(argv) == 0
    state = torch.load(checkpoint)["model"]
    torch.testing.assert_close(read_checkpoint(output)["model"], dict(state), rtol=0, atol=0)
    network = deit.load(output)  # which says itself what it is
    assert network.class_names == ["a", "b", "é"]
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(network(images), deit.load(checkpoint)(images), rtol=0, atol=0)
    with safe_open(output, "pt") as file:
        assert NetworkInfo.from_metadata(file.metadata()).class_names == ("a", "b", "é")


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    write = files.FORMATS["torch-export"]

    def wrong(*args, **kwargs):
        run = write(*args, **kwargs)
        return lambda images: run(images) * 1.01

    monkeypatch.setitem(files.FORMATS, "torch-export", wrong)
    output = tmp_path / "network.pt2"
    output.write_bytes(b"before")
    argv = [*SMALL, "--input-size", "16", "--format", "torch-export", "--output", str(output)]
    with pytest.raises(UserError, match=r"differ from the network's by 1\.0e-02"):
        main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]
    assert output.read_bytes() == b"before"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx", "--output", "x.pt2"], "must end in .onnx"),
        (["--format", "safetensors", "--output", "x.safetensors", "--fold"], "--fold is for"),
        (["--format", "torch-export", "--output", "x.pt2", "--opset", "18"], "--opset is of ONNX"),
        (["--format", "torch-export", "--output", "no/x.pt2"], "there is no folder"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        main([*SMALL, *options])


def test_packages_that_are_absent():
    with pytest.raises(UserError, match=r"needs not_there: pip install '.\[deploy\]'"):
        files.require_onnx("not_there")
