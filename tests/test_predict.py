"""`deit/predict.py`: real photographs, the same answers from checkpoints and ONNX files."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import save_network

from deit.data.photos import read_photos
from deit.errors import UserError
from deit.export import main as export
from deit.models.vit import VisionTransformer
from deit.predict import command, main


@pytest.fixture
def checkpoint(tmp_path) -> str:
    return save_network(tmp_path / "checkpoint.pth")


@pytest.fixture
def logits_are(monkeypatch):
    """Puts a function of images in the place of networks."""

    def patch(function):
        def forward(self, images):  # on the meta device networks are only tried
            return images.new_zeros(len(images), 3) if images.is_meta else function(images)

        monkeypatch.setattr(VisionTransformer, "forward", forward)

    return patch


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


def test_checkpoint_and_onnx_agree(folder, tmp_path, capsys):
    """With another crop and another normalisation than the defaults."""
    pytest.importorskip("onnxscript")
    checkpoint, onnx, names = (str(tmp_path / name) for name in ("a.pth", "a.onnx", "names.txt"))
    save_network(checkpoint, eval_warp_from=16, imagenet_default_mean_and_std=False)
    assert export(["--resume", checkpoint, "--format", "onnx", "--output", onnx]) == 0
    Path(names).write_text("ant\nbee\n")
    output = tmp_path / "found.jsonl"
    for argv, expected in (([], {"a", "b", "é"}), (["--class-map", names], {"ant", "bee", "2"})):
        found = []
        for source in (["--checkpoint", checkpoint], ["--onnx", onnx]):
            options = [str(folder), *source, "--output", str(output), "--mirror-check", *argv]
            assert main([*options, "--device", "cpu", "--batch-size", "2"]) == 0
            found.append([json.loads(line) for line in output.read_text().splitlines()])
        for ours, theirs in zip(*found, strict=True):
            assert ours["file"] == theirs["file"]
            assert {p["class"] for p in ours["predictions"]} == expected
            pairs = zip(ours["predictions"], theirs["predictions"], strict=True)
            assert all(abs(p["probability"] - q["probability"]) < 1e-5 for p, q in pairs)
    printed = capsys.readouterr()
    assert "5 photographs classified, 2 skipped" in printed.out
    assert "another class for the mirror image: 0 of 5 (0.00 %)" in printed.out
    assert printed.err.count(f"skipped {folder}/cut.jpg") == 4
    assert printed.err.count(f"not read in {folder}: .txt: 1, hidden files: 1\n") == 4


def test_images_are_prepared_as_in_evaluation(tmp_path, logits_are):
    """Warped or cropped, and normalised, as the training's options say."""
    seen = []
    logits_are(lambda images: seen.append(images) or torch.zeros(len(images), 3))
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:2] = 255  # cut off by a crop of the centre
    Image.fromarray(pixels).save(tmp_path / "x.png")
    warped = {"eval_warp_from": 16, "imagenet_default_mean_and_std": False}
    for options in ({"eval_crop_ratio": 0.5}, warped):
        checkpoint = save_network(tmp_path / "checkpoint.pth", **options)
        words = [str(tmp_path / "x.png"), "--checkpoint", checkpoint, "--device", "cpu"]
        assert main(words) == 0
    assert seen[0].amax((0, 2, 3)).tolist() == pytest.approx([-2.118, -2.036, -1.804], abs=1e-3)
    assert (seen[1].min(), seen[1].max()) == (-1, 1)


def test_photographs_are_turned(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left side is the upper one then
    paths = [str(tmp_path / f"x.{kind}") for kind in ("jpg", "png", "tiff")]
    for path in paths:
        Image.fromarray(pixels).save(path, exif=exif)
    ((read, images),) = read_photos(paths, lambda image: torch.tensor(np.array(image)), 9, 1)
    assert (read, images.shape) == (paths, (3, 32, 16, 3))
    assert images[:, 4].min() > 250
    assert images[:, 28].max() < 5


def test_csv_and_exit_status(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "found.csv"
    argv = ["--checkpoint", checkpoint, "--device", "cpu", "--topk", "2", "--output", str(output)]
    assert main([str(folder / "rgb.jpg"), str(folder / "text.png"), *argv]) == 0
    (row,) = csv.DictReader(output.open(encoding="utf-8"))
    kinds = [f"{kind}_{number}" for number in (1, 2) for kind in ("class", "probability")]
    assert list(row) == ["file", *kinds]
    assert row["file"] == str(folder / "rgb.jpg")
    assert float(row["probability_1"]) >= float(row["probability_2"])
    output.unlink()
    assert main([str(folder / "text.png"), *argv]) == 1
    assert "0 photographs classified, 1 skipped" in capsys.readouterr().out
    assert not output.exists()


def test_a_thousand_outputs_are_imagenets(folder, tmp_path, capsys):
    output = tmp_path / "found.csv"
    argv = [str(folder / "rgb.jpg"), "--device", "cpu", "--topk", "1000", "--output", str(output)]
    assert main([*argv, "--checkpoint", save_network(tmp_path / "a.pth", 1000, None)]) == 0
    assert "1000 outputs stand for: ImageNet-1K's" in capsys.readouterr().err
    (row,) = csv.DictReader(output.open(encoding="utf-8"))
    found = {row[f"class_{n}"]: row[f"description_{n}"] for n in range(1, 1001)}
    assert len(found) == 1000
    assert found["n01440764"] == "tench, Tinca tinca"


def test_outputs_that_are_not_finite(checkpoint, tmp_path, logits_are, capsys):
    """Those of an image or of its mirror image alone: left out, and one line at the end."""

    def white_corners_are_nan(images):
        logits = images.new_zeros(len(images), 3)
        logits[images[:, 0, 0, 0] > 2] = torch.nan
        return logits

    logits_are(white_corners_are_nan)
    for name, columns in {"left": slice(8), "right": slice(8, None), "neither": slice(0)}.items():
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:, columns] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("left", "right", "neither")]
    output = tmp_path / "found.jsonl"
    argv = [*files, "--checkpoint", checkpoint, "--device", "cpu", "--output", str(output)]
    for options, left_out in (((), 1), (("--mirror-check",), 2)):
        assert command([*argv, *options]) == 2
        assert capsys.readouterr().err == (
            f"error: the network's outputs are infinite or NaN for {left_out} photographs, which "
            "are left out\n"
        )
        rows = [json.loads(line)["file"] for line in output.read_text().splitlines()]
        assert rows == files[left_out:]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt, 130, "interrupted\n"),
        (RuntimeError("out of\nmemory"), 2,
         "error: the network cannot take 1 images at once: out of memory\n"),
    ],
)  # fmt: skip
def test_stopped_half_way(error, status, message, checkpoint, folder, tmp_path, logits_are, capsys):
    seen = []

    def third_call_fails(images):
        seen.append(images)
        if len(seen) % 3 == 0:
            raise error
        return torch.zeros(len(images), 3)

    logits_are(third_call_fails)
    files = [str(folder / name) for name in ("rgb.jpg", "alpha.png", "cmyk.jpg")]
    argv = [*files, "--checkpoint", checkpoint, "--device", "cpu", "--batch-size", "1"]
    assert command(argv) == status
    printed = capsys.readouterr()
    assert printed.err == message
    assert [line.split()[0] for line in printed.out.splitlines()] == files[:2]
    for name in ("old.csv", "new.csv"):
        (tmp_path / "old.csv").write_text("as it was")
        before = sorted(tmp_path.iterdir())
        assert command([*argv, "--output", str(tmp_path / name)]) == status
        assert sorted(tmp_path.iterdir()) == before
        assert (tmp_path / "old.csv").read_text() == "as it was"


def test_readers_may_stop_reading(checkpoint, folder, monkeypatch, capsys):
    """As `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert command([str(folder), "--checkpoint", checkpoint, "--device", "cpu"]) == 0
    assert "Error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("photos", "give one network"),
        ("nowhere --checkpoint a.pth", "there is no file or folder 'nowhere'"),
        ("photos --checkpoint a.onnx", r"'a\.onnx' is no checkpoint: give it by --onnx"),
        ("photos --onnx a.onnx --device foo", "'foo' is not one of auto, cpu, cuda"),
        ("photos --onnx a.onnx --model-ema-eval", "are for a --checkpoint"),
        ("empty --checkpoint a.pth", r"there are no images in .*; not read in .*: \.txt: 1"),
        ("photos --checkpoint checkpoint.pth --class-map four.txt",
         "names 4 classes, but the network has 3 outputs"),
    ],
)  # fmt: skip
def test_wrong_input(words, message, checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/a.TXT").write_text("no image")
    Path("four.txt").write_text("\n".join("abcd"))
    with pytest.raises(UserError, match=message):
        main(words.split())
