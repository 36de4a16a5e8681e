"""Commands that take a checkpoint build the network in it, and say which weights they take."""

import functools
import json
import pathlib
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from training_runs import load, refused, run, train

import deit
from deit.data import DeviceLoader, build_dataset, eval_transform, evaluation_batches
from deit.errors import UserError, one_line_errors
from deit.measure import command as complexity
from deit.train.args import parse_args
from deit.train.teacher import build_teacher

MODEL = "d2_deit_tiny_patch16_LS"
KWARGS = {"depth": 1, "embed_dim": 16, "num_heads": 2}
OPTIONS = ("--model", MODEL, "--input-size", "16", "--patch-size", "8", "--attn-mixer",
           "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items()),
           "--epochs", "1", "--model-ema-decay", "0.5")  # fmt: skip
FEW = ("--device", "cpu", "--num-workers", "0", "--threads", "1", "--batch-size", "4",
       "--epochs", "1", "--warmup-epochs", "0")  # fmt: skip


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert train(*OPTIONS, data=data, out=out) == 0
    return out / "checkpoint.pth"


run = functools.partial(run, base=FEW)
refused = functools.partial(refused, base=FEW)


def link_classes(data, folder, names, splits=("train", "val")):
    """The first classes of `data`, or those that a dict says, under other names."""
    if not isinstance(names, dict):
        names = {name: f"class{number}" for number, name in enumerate(names)}
    for split in splits:
        (folder / split).mkdir(parents=True)
        for name, original in names.items():
            (folder / split / name).symlink_to(data / split / original)
    return folder


def scores(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("*"))


def assert_holds(network, state):
    own = network.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], value) for key, value in state.items())


def test_load(file):
    saved = torch.load(file)  # with torch's defaults
    assert not torch.equal(saved["model"]["head.weight"], saved["model_ema"]["head.weight"])
    network = deit.load(file)
    assert_holds(network, saved["model"])
    assert network.class_names == ["class0", "class1", "class2"]
    assert not network.training
    assert network(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    assert_holds(deit.load(str(file), ema=True), saved["model_ema"])
    assert deit.load(file, img_size=32)(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    other = deit.load(file, num_classes=5)
    assert other(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    assert other.class_names is None


def test_timms_own_loader_takes_the_average(file):
    """As the README says."""
    kwargs = {"img_size": 16, "patch_size": 8, "use_attn_mixer": True, "num_classes": 3}
    network = timm.create_model(MODEL, checkpoint_path=str(file), **kwargs, **KWARGS)
    assert_holds(network, load(file)["model_ema"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"img_size": "a"}, "img_size 'a' is n"),
        ({"img_size": 0}, "img_size 0 is n"),
        ({"img_size": (64,)}, r"img_size \(64,\) is n"),
        ({"img_size": (8, 8, 8)}, r"img_size \(8, 8, 8\) is n"),
        ({"img_size": 16.0}, "img_size 16.0 is n"),
        ({"num_classes": -1}, "num_classes -1 is no"),
        ({"num_classes": "3"}, "num_classes '3' is no"),
        ({"depth": 2}, "does not fit"),
        # another model's options are not taken
        ({"model": "test_vit"}, "does not fit"),
    ],
)
def test_load_refuses_what_cannot_be(file, wrong, words):
    with pytest.raises(UserError, match=words):
        deit.load(file, **wrong)


def test_load_of_older_and_bare_files(file, tmp_path):
    saved = load(file)
    args = Namespace(**saved["args"])
    args.output_dir = pathlib.PosixPath("/data/run")
    args.model_kwargs = [tuple(pair) for pair in args.model_kwargs]
    old = {"model": saved["model"], "args": args, "class_names": ("ant", "bee", "cat")}
    torch.save(old, tmp_path / "old.pth")
    network = deit.load(tmp_path / "old.pth")
    assert_holds(network, saved["model"])
    assert network.class_names == ["ant", "bee", "cat"]
    with pytest.raises(UserError, match="no 'model_ema'"):
        deit.load(tmp_path / "old.pth", ema=True)
    save_file(saved["model"], tmp_path / "bare.SAFETENSORS")
    bare = deit.load(tmp_path / "bare.SAFETENSORS", model=MODEL, depth=1, embed_dim=16, num_heads=2)
    assert_holds(bare, saved["model"])  # patches, mixer, image size and classes from the shapes
    assert bare.class_names is None
    with pytest.raises(UserError, match="does not say which model it is"):
        deit.load(tmp_path / "bare.SAFETENSORS")


def test_evaluation_needs_nothing_but_the_file(file, data):
    printed = run("--eval", "--resume", file, "--flop-eval")
    accuracy = f"{load(file)['progress']['history'][-1]['test_acc1']:.3f}"
    assert scores(printed).startswith(f"* Acc@1 {accuracy} ")
    # a mirror-invariant network gives each image and its mirror image the same answer
    assert scores(printed).endswith(f"mirrored Acc@1 {accuracy} same answer 100.000")
    taken = f"--model {MODEL} --input-size 16 --patch-size 8 --attn-mixer --model-kwargs depth=1 e"
    assert taken in printed
    assert f"--data-path {data}" in printed
    for more in ((), ("--data-set", "image_folder")):
        named = run(
            "--eval", "--resume", file, "--flop-eval", "--eval-data-path", data / "val", *more
        )
        assert scores(named) == scores(printed)


def test_evaluation_without_a_file(data):
    ordinary = ("--model", "test_vit", "--input-size", "32", "--data-path", data)
    printed = run("--eval", *ordinary, "--flop-eval")
    assert "evaluating random weights" in printed
    assert float(scores(printed).split()[-1]) < 100


def test_networks_for_images_that_are_not_square(data, tmp_path):
    network = timm.create_model(MODEL, img_size=(32, 64), depth=1, num_classes=3)
    torch.save(network.state_dict(), tmp_path / "wide.pth")
    argv = ("--model", MODEL, "--model-kwargs", "depth=1", "--data-path", data)
    error = refused("--eval", "--resume", tmp_path / "wide.pth", *argv)
    assert "is for images of 32 x 64 pixels" in error
    loaded = deit.load(tmp_path / "wide.pth", model=MODEL, depth=1)
    assert_holds(loaded, network.state_dict())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--input-size 32", "--input-size is 32, it was 16"),
        ("--input-size 224", "--input-size is 224, it was 16"),  # the default, but given
        ("--model-kwargs depth=2", "--model-kwargs depth is 2, it was 1"),
        (
            "--model resmlp_12 --input-size 16",
            "--model resmlp_12, but {file} was saved from {name}",
        ),
        ("--nb-classes 7", "has 3 outputs: omit it"),
    ],
)
def test_differences_are_named(argv, words, file):
    error = refused("--eval", "--resume", file, *argv.split())
    assert words.format(file=file, name=MODEL) in error


def test_training_goes_on_and_starts_with_the_network_of_the_file(file, data, tmp_path):
    common = ("--data-path", data, "--output-dir", tmp_path)
    printed = run("--resume", file, *common, "--epochs", "2")
    assert f"--model {MODEL} --input-size 16" in printed
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1
    other = ("--nb-classes", "5", "--input-size", "32", "--overwrite")
    for how in ((), ("--eval",)):
        printed = run("--finetune", file, *common, *other, *how)
        assert "the trained weights (model), not their average" in printed
        assert "2 initialised anew (head." in printed
    assert len(load(tmp_path / "checkpoint.pth")["model"]["head.weight"]) == 5


def test_the_complexity_is_that_of_the_network_in_the_file(file, tmp_path, capsys):
    argv = ["--checkpoint", str(file), "--no-throughput", "--json", str(tmp_path / "c.json")]
    assert complexity.main(argv) == 0
    twin, ours = json.loads((tmp_path / "c.json").read_text())["results"]
    assert (twin["model"], ours["model"]) == ("deit_tiny_patch16_LS", MODEL)
    trained = [p.numel() for p in deit.load(file).parameters() if p.requires_grad]
    assert (ours["params"], twin["params"] < 10_000) == (sum(trained), True)  # as narrow, shallow
    assert one_line_errors(lambda: complexity.main([*argv, "--model-kwargs", "depth=3"])) == 2
    assert "missing keys" in capsys.readouterr().err


def test_the_teachers_outputs_are_put_in_the_students_order(file):
    args = parse_args(["--teacher-model", MODEL, "--teacher-path", str(file)])
    teacher = build_teacher(args, 2, "cpu", ["class2", "class0"])
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher(images), deit.load(file)(images)[:, [2, 0]])
    with pytest.raises(UserError, match=r"1 classes of the data \(cat\)"):
        build_teacher(args, 2, "cpu", ["class0", "cat"])


@pytest.mark.parametrize(
    ("argv", "entry", "value"),
    [
        ("--eval --resume", "model", {"patch_embed.flatten_and_permute.permutation": [0, 0, 0, 0]}),
        ("--eval --resume", "class_names", [1, 2, 3]),
        ("--eval --resume", "class_names", {0: "ant"}),
        ("--eval --resume", "args", {"eval_crop_ratio": "much"}),
        ("--eval --resume", "args", {"model": 5}),
        ("--finetune", "args", {"model_kwargs": 5}),
        ("--resume", "args", {1: 2}),
        ("--resume", "optimizer", {}),
        ("--resume", "progress", None),
        ("--resume", "step", None),
        ("--resume", "processes", [{}]),
    ],
)
def test_entries_of_other_kinds(argv, entry, value, file, data, tmp_path):
    saved = load(file)
    if entry == "model":
        value = {key: torch.tensor(numbers) for key, numbers in value.items()}
    if entry in ("model", "args"):
        value = saved[entry] | value
    torch.save(saved | {entry: value}, tmp_path / "damaged.pth")
    error = refused(*argv.split(), tmp_path / "damaged.pth", "--data-path", data)
    assert "damaged.pth' is damaged" in error


# labels


def test_folders_of_some_of_the_classes(file, data, tmp_path):
    some = {"class1": "class1", "class2": "class2"}
    argv = ("--eval", "--data-path", link_classes(data, tmp_path, some, ["val"]), "--resume")
    named = run(*argv, file)
    assert "the data have 2 of the 3 classes" in named
    images = build_dataset("val", root=data, transform=eval_transform(16))
    network = deit.load(file)
    batches = DeviceLoader(images, evaluation_batches(len(images), 1), device="cpu")
    right = [bool(network(x).argmax() == label) for x, label in batches if label > 0]
    assert f"Acc@1 {100 * sum(right) / len(right):.3f} " in named

    nameless = tmp_path / "nameless.pth"
    torch.save({key: value for key, value in load(file).items() if key != "class_names"}, nameless)
    error = refused(*argv, nameless, "--nb-classes", "3")
    assert "2 classes" in error
    assert "--class-map FILE" in error
    (tmp_path / "map.txt").write_text("class0\nclass1\nclass2\n")
    mapped = run(*argv, nameless, "--class-map", tmp_path / "map.txt")
    assert scores(mapped) == scores(named)
    (tmp_path / "val" / "other").symlink_to(data / "val" / "class0")
    assert "1 classes of the data (other)" in refused(*argv, file)


def test_a_classifier_for_other_classes_is_not_taken(file, data, tmp_path):
    argv = ("--data-path", link_classes(data, tmp_path, ["cat", "dog", "owl"]))
    assert "initialised anew (head" in run("--finetune", file, *argv)
    error = refused("--resume", file, *argv)
    assert "3 classes of the data (cat, dog, owl)" in error


def test_published_training_goes_on_with_some_of_imagenets_classes(data, tmp_path):
    """Its file has no names: the labels are ImageNet's, not the order of the folders."""
    synsets, path = ImageNetInfo("imagenet-1k").label_names(), tmp_path / "out" / "checkpoint.pth"
    own = {"data": link_classes(data, tmp_path, synsets[500:503]), "out": path.parent}
    assert train(*OPTIONS, "--nb-classes", "1000", **own) == 0
    torch.save({key: v for key, v in load(path).items() if key != "class_names"}, path)
    printed = run(*OPTIONS, "--resume", "auto", "--epochs", "2", **own)
    assert "the data have 3 of the 1000 classes of ImageNet-1K" in printed
    assert load(path)["class_names"] == synsets


# what cannot be scored


def test_what_is_not_finite(file, data, tmp_path):
    path, saved = tmp_path / "broken.pth", load(file)
    huge = {k: v * 1e25 if v.is_floating_point() else v for k, v in saved["model"].items()}
    torch.save(saved | {"model": huge}, path)
    error = refused("--eval", "--resume", path)
    assert "the logits of 17 of 17 images are infinite or NaN" in error
    saved["model"]["head.weight"][0, 0] = float("nan")
    torch.save(saved, path)
    with pytest.raises(UserError, match="infinite or NaN"):
        deit.load(path)
    for argv in (("--eval", "--resume"), ("--eval", "--finetune"), ("--resume",), ("--finetune",)):
        error = refused(*argv, path, "--data-path", data)
        assert "weights that are infinite or NaN, in 1 tensor (head.weight)" in error
