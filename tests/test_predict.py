"""`deit/predict.py`: real photographs, the same answers from checkpoints and ONNX files."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import deit.models  # noqa: F401 - registers the networks
from deit.data.photos import find_photos, read_photo
from deit.equivariance import randomize_
from deit.errors import UserError
from deit.export import main as export
from deit.predict import main

KWARGS = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}


@pytest.fixture
def checkpoint(tmp_path):
    model = timm.create_model("d2_deit_tiny_patch16_LS", img_size=16, num_classes=3, **KWARGS)
    args = {"model": "d2_deit_tiny_patch16_LS", "input_size": 16, "eval_crop_ratio": 0.8,
            "model_kwargs": [list(pair) for pair in KWARGS.items()]}  # fmt: skip
    saved = {"model": randomize_(model).state_dict(), "args": args, "class_names": ["a", "b", "é"]}
    torch.save(saved, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


@pytest.fixture
def folder(tmp_path):
    """Five readable photographs, two that are not, and files that are no photographs."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "alpha.png")
    Image.fromarray(pixels[..., :3]).save(folder / "rgb.jpg")
    Image.fromarray(pixels[..., 0]).save(folder / "sub" / "grey.jpg")
    Image.fromarray(pixels, mode="CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    (folder / "cut.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:600])
    (folder / "text.png").write_text("no image")
    (folder / "readme.txt").write_text("no image")
    (folder / "._rgb.jpg").write_text("hidden")
    return folder


def test_checkpoint_and_onnx_agree(checkpoint, folder, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    onnx = str(tmp_path / "network.onnx")
    assert export(["--resume", checkpoint, "--format", "onnx", "--output", onnx]) == 0
    found = []
    for source in (["--checkpoint", checkpoint], ["--onnx", onnx]):
        output = tmp_path / "found.jsonl"
        argv = [str(folder), *source, "--output", str(output), "--mirror-check"]
        assert main([*argv, "--device", "cpu", "--batch-size", "2"]) == 0
        found.append([json.loads(line) for line in output.read_text().splitlines()])
    printed = capsys.readouterr()
    assert "5 photographs classified, 2 skipped" in printed.out
    assert "another class for the mirror image: 0 of 5 (0.00 %)" in printed.out
    assert printed.err.count(f"skipped {folder}/cut.jpg") == 2
    for ours, theirs in zip(*found, strict=True):
        assert ours["file"] == theirs["file"]
        assert {p["class"] for p in ours["predictions"]} == {"a", "b", "é"}
        pairs = zip(ours["predictions"], theirs["predictions"], strict=True)
        assert all(abs(p["probability"] - q["probability"]) < 1e-5 for p, q in pairs)


def test_csv_and_exit_status(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "found.csv"
    argv = ["--checkpoint", checkpoint, "--device", "cpu", "--topk", "2", "--output", str(output)]
    assert main([str(folder / "rgb.jpg"), str(folder / "text.png"), *argv]) == 0
    rows = list(csv.DictReader(output.open(encoding="utf-8")))
    assert [row["file"] for row in rows] == [str(folder / "rgb.jpg")]
    assert float(rows[0]["probability_1"]) >= float(rows[0]["probability_2"])
    output.unlink()
    assert main([str(folder / "text.png"), *argv]) == 1
    assert "0 photographs classified, 1 skipped" in capsys.readouterr().out
    assert not output.exists()


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
def test_photographs_are_turned(tmp_path, kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left side is the upper one then
    Image.fromarray(pixels).save(tmp_path / f"x.{kind}", exif=exif)
    image = read_photo(tmp_path / f"x.{kind}")
    assert image.size == (16, 32)
    assert image.getpixel((8, 4))[0] > 250
    assert image.getpixel((8, 28))[0] < 5


def test_wrong_input(checkpoint, folder, tmp_path):
    with pytest.raises(UserError, match="give one network"):
        main([str(folder)])
    with pytest.raises(UserError, match="there is no file or folder 'nowhere'"):
        main(["nowhere", "--checkpoint", checkpoint])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no images in"):
        find_photos([str(tmp_path / "empty")])
