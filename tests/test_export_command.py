"""`deit/export.py`: files that hold the network, checked in their own runtimes."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from training_runs import SMALL_VIT, save_network

import deit
from deit.deploy import files
from deit.deploy.info import NetworkInfo
from deit.errors import UserError
from deit.export import SUFFIXES, main
from deit.train.checkpoint import read_checkpoint

SMALL = "--model d2_deit_tiny_patch16_LS --model-kwargs "
SMALL += " ".join(f"{key}={value}" for key, value in SMALL_VIT.items())
INT8 = ["--quantize", "dynamic"]
any_batch = pytest.mark.skipif(not files.ANY_BATCH_IN_ONNX, reason="torch 2.6 fixes the batch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_network(tmp_path_factory.mktemp("network") / "checkpoint.pth")


def export(format: str, output: Path, *options: str | Path) -> None:
    assert main(["--format", format, "--output", str(output), *map(str, options)]) == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder a class, as in an ImageFolder, with eight images each."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("a", "b", "é"):
        (folder / name).mkdir()
        for number in range(8):
            pixels = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((20, 16), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{number}.png")
    return folder


@any_batch
@pytest.mark.parametrize("options", [("--no-fold", "--half"), ("--normalize-input",)])
def test_onnx(checkpoint, tmp_path, capsys, options):
    pytest.importorskip("onnxscript")
    output = tmp_path / "network.onnx"
    export("onnx", output, "--resume", checkpoint, "--dynamic-batch", *options)
    assert "greatest difference from the network" in capsys.readouterr().out
    network = files.OnnxNetwork(output)
    assert network.batch is None
    info = NetworkInfo.from_metadata(network.metadata)
    assert info.class_names == ("a", "b", "é")
    assert (info.input_size, info.crop_ratio) == ((16, 16), 0.8)
    assert info.normalized == ("--normalize-input" not in options)
    images = torch.rand(5, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    expected = deit.load(checkpoint)(images if info.normalized else (images - mean) / std)
    tolerance = 2e-2 if "--half" in options else 1e-4
    torch.testing.assert_close(network(images), expected, rtol=tolerance, atol=tolerance)
    assert list(tmp_path.iterdir()) == [output]


@any_batch
@pytest.mark.parametrize(
    ("mode", "options"),
    [("dynamic", ["--dynamic-batch"]), ("static", ["--batch-size", "5", "--normalize-input"])],
)
def test_int8(checkpoint, photos, tmp_path, capsys, mode, options):
    """What is said of the file is what a second look at all of its images finds."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    output = tmp_path / "network.onnx"
    if mode == "static":
        options = [*options, "--calibrate", photos]
    options += ["--quantize", mode, "--eval-data-path", photos]
    export("onnx", output, "--resume", checkpoint, *options)
    said = capsys.readouterr().out
    network = files.OnnxNetwork(output)
    about = json.loads(network.metadata["quantization"])
    assert about["mode"] == mode
    assert about["calibration_images"] == (24 if mode == "static" else None)
    info = NetworkInfo.from_metadata(network.metadata)
    assert info.class_names == ("a", "b", "é")

    transform = info.transform()
    data = deit.data.build_dataset("val", name="image_folder", root=photos, transform=transform)
    pixels = torch.stack([torch.as_tensor(data[i][0]) for i in range(24)])
    labels = torch.tensor([data[i][1] for i in range(24)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    with torch.no_grad():
        expected = deit.load(checkpoint)((pixels / 255 - mean) / std)
    found = network(info.prepare(pixels))
    flopped = network(info.prepare(pixels).flip(-1))
    answers = found.argmax(1)

    def stated(pattern: str) -> list[float]:
        return [float(text) for text in re.search(pattern, said).groups()]

    def percent(hits: torch.Tensor) -> float:
        return pytest.approx(100 * hits.double().mean().item(), abs=0.01)

    largest, same, count = stated(r"network (\S+) .* the same answer for (\S+) % of (\S+) images")
    assert largest == pytest.approx((found - expected).abs().max().item(), rel=0.06)
    assert 0 < largest < 0.2 * expected.norm(dim=1).mean()
    assert same == percent(answers == expected.argmax(1))
    assert count == 24
    accuracy = [percent(a == labels) for a in (expected.argmax(1), answers)]
    assert stated(r"float (\S+) %, int8 (\S+) %") == accuracy
    other, mirrored = stated(r"int8: another answer for (\S+) % .*greatest difference (\S+)")
    assert other == percent(answers != flopped.argmax(1))
    assert mirrored == pytest.approx((found - flopped).abs().max().item(), rel=0.06)
    assert stated(r"mirrored, float: another answer for (\S+) %") == [0]

    nodes = onnx.load(output).graph.node
    integer = "MatMulInteger" if mode == "dynamic" else "DequantizeLinear"
    assert [node.op_type for node in nodes].count(integer) >= 13
    # the logits, and what is averaged by the attention
    kinds = {name: node.op_type for node in nodes for name in node.output}
    products = [n for n in nodes if n.op_type == "MatMul" and kinds.get(n.input[1]) == "Transpose"]
    assert len(products) == 3
    assert not any("Dequantize" in kinds[name] for node in products for name in node.input)
    assert list(tmp_path.iterdir()) == [output]


@any_batch
def test_int8_of_a_convnext(tmp_path, capsys):
    """Depthwise layers stay in float; without labels no accuracy is stated."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    output = tmp_path / "network.onnx"
    small = "--model d2_convnext_isotropic_small --nb-classes 3 --input-size 32 --model-kwargs "
    small += "depth=1 embed_dim=32 patch_size=8 layer_scale_init_value=1.0"
    export("onnx", output, *small.split(), "--quantize", "dynamic")
    said = capsys.readouterr().out
    assert "% of 64 images" in said
    assert "accuracy:" not in said
    kinds = [node.op_type for node in onnx.load(output).graph.node]
    assert kinds.count("Conv") == 2  # one for u and one for v
    assert kinds.count("ConvInteger") == 7


def interrupt(logits):
    raise KeyboardInterrupt("by hand")


@pytest.mark.parametrize(
    ("options", "wrong", "message"),
    [
        ([], lambda logits: logits * 1.01, r"differ from the network's by 1\.0e-02"),
        ([], lambda logits: logits * torch.nan, "differ from the network's by nan"),
        ([], lambda logits: logits[:, 1:], r"gives \(1, 2\), the network \(1, 3\)"),
        ([], interrupt, "^by hand$"),
        (INT8, lambda logits: logits * torch.nan, "infinite or NaN"),
        (INT8, lambda logits: -logits, r"answer for 0\.0 % of 64 images, no more than guessing"),
    ],
    ids=["other", "NaN", "fewer", "interrupted", "int8 NaN", "guesses"],
)
def test_a_file_that_differs_is_not_left(
    checkpoint, tmp_path, monkeypatch, options, wrong, message
):
    monkeypatch.setattr(files, "require_onnx", lambda: None)
    monkeypatch.setattr(files, "ANY_BATCH_IN_ONNX", True)
    network = deit.load(checkpoint)

    def broken(images):
        return wrong(network(images))

    def write(program, example, path, *args, **kwargs):
        path.write_bytes(b"new")
        return network if options else broken

    monkeypatch.setitem(files.FORMATS, "onnx", write)
    monkeypatch.setattr(files, "quantize_onnx", lambda *args: broken)
    output = tmp_path / "network.onnx"
    output.write_bytes(b"before")
    with pytest.raises((UserError, KeyboardInterrupt), match=message):
        export("onnx", output, "--resume", checkpoint, *options)
    assert list(tmp_path.iterdir()) == [output]
    assert output.read_bytes() == b"before"


def test_torch_export_with_a_fixed_batch(tmp_path):
    output, operations = tmp_path / "network.pt2", []
    options = "--input-size 16 24 --nb-classes 4 --batch-size 3"
    for fold in ("--fold", "--no-fold"):
        export("torch-export", output, *SMALL.split(), *options.split(), fold)
        extra = {"metadata.json": ""}
        program = torch.export.load(output, extra_files=extra).module()
        operations.append(len(program.graph.nodes))
        assert program(torch.zeros(3, 3, 16, 24)).shape == (3, 4)
        info = NetworkInfo.from_metadata(json.loads(extra["metadata.json"]))
        assert info.input_size == (16, 24)
    assert operations[0] < operations[1]


@pytest.mark.parametrize("format", ["torch-export", "safetensors"])
def test_full_disk(checkpoint, tmp_path, format):
    """The kernel's limit on the size of a file acts as a full disk does, down in the C++ writer."""
    output = tmp_path / f"network{SUFFIXES[format]}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"larger than the system allows in .* no previous file"
        ):
            export(format, output, "--resume", checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_safetensors_hold_the_networks_own_weights(checkpoint, tmp_path):
    output = tmp_path / "network.safetensors"
    export("safetensors", output, "--resume", checkpoint, "--no-fold")
    state = torch.load(checkpoint)["model"]
    torch.testing.assert_close(read_checkpoint(output)["model"], dict(state), rtol=0, atol=0)
    network = deit.load(output)  # which says itself what it is
    assert network.class_names == ["a", "b", "é"]
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(network(images), deit.load(checkpoint)(images), rtol=0, atol=0)
    with safe_open(output, "pt") as file:
        assert NetworkInfo.from_metadata(file.metadata()).class_names == ("a", "b", "é")
    names = tmp_path / "map.txt"
    names.write_text("x\ny\nz\n")
    export("safetensors", output, "--resume", checkpoint, "--half", "--class-map", names)
    assert output.stat().st_mode == names.stat().st_mode  # the umask's, as of any file
    halves = read_checkpoint(output)["model"]
    assert halves["head.weight"].equal(state["head.weight"].half())
    assert deit.load(output).class_names == ["x", "y", "z"]


ONNX, PT2 = "--format onnx --output x.onnx", "--format torch-export --output x.pt2"
STATIC = f"{ONNX} --input-size 16 --quantize static --calibrate"
DYNAMIC = f"{ONNX} --quantize dynamic"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format onnx --output x.pt2", "must end in .onnx"),
        ("--format safetensors --output x.safetensors --fold", "--fold is for"),
        ("--format torch-export --output no/x.pt2", "there is no folder"),
        (f"{PT2} --opset 18", "--opset is for --format onnx"),
        (f"{PT2} --dynamic-batch --batch-size 2", "--batch-size is for programs of one batch size"),
        (f"{PT2} --model-ema-eval", "--model-ema-eval is for the average in a checkpoint"),
        (f"{PT2} --resume a.pth --nb-classes 2", "--nb-classes is for random weights"),
        (f"{PT2} --input-size 8 8 8", "a side, or height and width, not 3 numbers"),
        (f"{PT2} --model-kwargs in_chans=1", "takes images of 1 channels here"),
        (f"{PT2} --class-map names.txt", "names 2 classes, but the network has 1000 outputs"),
        (f"{PT2} --quantize dynamic", "--quantize is for --format onnx"),
        (f"{ONNX} --opset 99", "--opset 99 cannot be written, opset 18 can"),
        (f"{ONNX} --quantize static", "give --calibrate FOLDER, or use --quantize dynamic"),
        (f"{ONNX} --calibrate .", "--calibrate is for --quantize static"),
        (f"{ONNX} --eval-data-path .", "--eval-data-path is for --quantize"),
        (f"{DYNAMIC} --calibrate .", "--calibrate is for --quantize static"),
        (f"{DYNAMIC} --half", "--half is for float16"),
        (f"{DYNAMIC} --eval-data-path empty", "no class folders in"),
        (f"{DYNAMIC} --eval-data-path classes", "nothing says which"),
        (f"{STATIC} nowhere", "--calibrate: there is no folder 'nowhere'"),
        (f"{STATIC} empty", "there are no images in 'empty'"),
        (f"{STATIC} broken", "none of the images in 'broken' can be read"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(files, "ANY_BATCH_IN_ONNX", True)  # what torch 2.6 says is no matter
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "classes/a"):
        Path(name).mkdir(parents=True)
    Path("names.txt").write_text("x\ny\n")
    Path("broken/a.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save("classes/a/1.png")
    with pytest.raises(UserError, match=message):
        main(f"{SMALL} {options}".split())
    assert not Path("x.onnx").exists()


def test_torch_that_fixes_the_batch(monkeypatch):
    monkeypatch.setattr(files, "ANY_BATCH_IN_ONNX", False)
    for option in ("--dynamic-batch", "--quantize=dynamic"):
        with pytest.raises(UserError, match=r"one batch size in float alone: use a later one"):
            main(f"{SMALL} {ONNX} {option}".split())


def test_packages_that_are_absent():
    with pytest.raises(UserError, match=r"needs not_there: pip install '.\[deploy\]'"):
        files.require_onnx("not_there")
