"""Commands that take a checkpoint build the network in it, and say which weights they take."""

import json
import pathlib
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from training_runs import load, make_images, train

import deit
from deit.data import build_dataset, build_eval_loader, eval_transform
from deit.errors import UserError, one_line_errors
from deit.main import main
from deit.measure import command as complexity
from deit.train.args import parse_args
from deit.train.checkpoint import Checkpoint
from deit.train.loading import build_as_trained
from deit.train.teacher import build_teacher

MODEL = "d2_deit_tiny_patch16_LS"
KWARGS = ("depth=1", "embed_dim=16", "num_heads=2")
OPTIONS = ("--model", MODEL, "--input-size", "16", "--patch-size", "8", "--attn-mixer",
           "--model-kwargs", *KWARGS, "--epochs", "1", "--model-ema-decay", "0.5")  # fmt: skip
FEW = ("--device", "cpu", "--num-workers", "0", "--threads", "1", "--batch-size", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert train(*OPTIONS, data=data, out=out) == 0
    return out / "checkpoint.pth"


def run(*argv: str) -> int:
    return one_line_errors(lambda: main(parse_args([*FEW, *argv])))


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


def test_timms_own_loader_takes_the_average(file):
    """As the README says."""
    kwargs = {"img_size": 16, "patch_size": 8, "use_attn_mixer": True, "num_classes": 3}
    kwargs |= {"depth": 1, "embed_dim": 16, "num_heads": 2}
    network = timm.create_model(MODEL, checkpoint_path=str(file), **kwargs)
    assert_holds(network, load(file)["model_ema"])


def test_load_for_other_images_and_classes(file):
    network = deit.load(file, img_size=32, num_classes=5)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert network.class_names is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"img_size": "a"},
        {"img_size": 0},
        {"img_size": (8, 8, 8)},
        {"img_size": 16.0},
        {"num_classes": -1},
        {"num_classes": "3"},
    ],
)
def test_load_refuses_what_is_no_number(file, wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"^{name} .* is n"):
        deit.load(file, **wrong)


def test_load_of_older_and_bare_files(file, tmp_path):
    saved = load(file)
    args = Namespace(**saved["args"])
    args.output_dir = pathlib.PosixPath("/data/run")
    args.model_kwargs = [tuple(pair) for pair in args.model_kwargs]
    torch.save({"model": saved["model"], "args": args}, tmp_path / "old.pth")
    assert_holds(deit.load(tmp_path / "old.pth"), saved["model"])
    save_file(saved["model"], tmp_path / "bare.safetensors")
    bare = deit.load(tmp_path / "bare.safetensors", model=MODEL, depth=1, embed_dim=16, num_heads=2)
    assert_holds(bare, saved["model"])  # patches, mixer, image size and classes from the shapes
    assert bare.class_names is None
    with pytest.raises(UserError, match="does not say which model it is"):
        deit.load(tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="no 'model_ema'"):
        deit.load(tmp_path / "old.pth", ema=True)
    with pytest.raises(UserError, match="does not fit"):
        deit.load(file, depth=2)


def test_evaluation_needs_nothing_but_the_file(file, data, capsys):
    assert run("--eval", "--resume", str(file)) == 0
    printed = capsys.readouterr().out
    scores = load(file)["progress"]["history"][-1]
    assert f"Acc@1 {scores['test_acc1']:.3f}" in printed
    taken = f"--model {MODEL} --input-size 16 --patch-size 8 --attn-mixer --model-kwargs depth=1 e"
    assert taken in printed
    assert f"--data-path {data}" in printed


def test_networks_for_images_that_are_not_square(data, tmp_path, capsys):
    network = timm.create_model(MODEL, img_size=(32, 64), depth=1, num_classes=3)
    torch.save(network.state_dict(), tmp_path / "wide.pth")
    argv = ("--model", MODEL, "--model-kwargs", "depth=1", "--data-path", str(data))
    assert run("--eval", "--resume", str(tmp_path / "wide.pth"), *argv) == 2
    assert "is for images of 32 x 64 pixels" in capsys.readouterr().err
    loaded = deit.load(tmp_path / "wide.pth", model=MODEL, depth=1)
    assert_holds(loaded, network.state_dict())


def test_differences_are_named(file, data, capsys):
    assert run("--eval", "--resume", str(file), "--input-size", "32") == 2
    assert "--input-size is 32, it was 16" in capsys.readouterr().err
    assert run("--eval", "--resume", str(file), "--model-kwargs", "depth=2") == 2
    assert "--model-kwargs depth is 2, it was 1" in capsys.readouterr().err
    assert run("--eval", "--resume", str(file), "--model", "resmlp_12", "--input-size", "16") == 2
    assert f"--model resmlp_12, but {file} was saved from {MODEL}" in capsys.readouterr().err
    assert run("--eval", "--resume", str(file), "--nb-classes", "7") == 2
    assert "has 3 outputs: omit it" in capsys.readouterr().err
    # the default value, but given: it counts
    assert run("--eval", "--resume", str(file), "--input-size", "224") == 2
    assert "--input-size is 224, it was 16" in capsys.readouterr().err


def test_training_goes_on_and_starts_with_the_network_of_the_file(file, data, tmp_path, capsys):
    common = ("--data-path", str(data), "--warmup-epochs", "0")
    assert run("--resume", str(file), *common, "--epochs", "2", "--output-dir", str(tmp_path)) == 0
    assert f"--model {MODEL} --input-size 16" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1
    assert run("--finetune", str(file), *common, "--epochs", "1", "--nb-classes", "5") == 0
    printed = capsys.readouterr().out
    assert "the trained weights (model), not their average" in printed
    assert "initialised anew (head" in printed


def test_the_check_of_equivariance_builds_the_network_of_the_file(file, monkeypatch, capsys):
    from deit.verify import cli as verify

    monkeypatch.setattr(verify.layers, "LAYER_CASES", [])
    run = lambda *argv: one_line_errors(lambda: verify.main([*argv, "--device", "cpu"]))  # noqa: E731
    assert run("--checkpoint", str(file)) == 0
    assert f"{MODEL}, checkpoint" in capsys.readouterr().out
    assert run("--checkpoint", str(file), "--model-kwargs", "depth=3") == 2
    assert "missing keys" in capsys.readouterr().err


def test_the_complexity_is_that_of_the_network_in_the_file(file, tmp_path, capsys):
    argv = ["--checkpoint", str(file), "--no-throughput", "--json", str(tmp_path / "c.json")]
    assert complexity.main(argv) == 0
    twin, ours = json.loads((tmp_path / "c.json").read_text())["results"]
    network = deit.load(file)
    assert (twin["model"], ours["model"]) == ("deit_tiny_patch16_LS", MODEL)
    assert ours["params"] == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert twin["params"] < 10_000  # as narrow and shallow
    assert one_line_errors(lambda: complexity.main([*argv, "--model-kwargs", "depth=3"])) == 2
    assert "missing keys" in capsys.readouterr().err
    few = ["--models", "d2_deit_tiny_patch16_LS", "--no-throughput", "--model-kwargs"]
    assert one_line_errors(lambda: complexity.main([*few, "num_heads=7"])) == 2
    assert "num_heads=7: " in capsys.readouterr().err


def test_another_models_options_are_not_taken(file):
    content = {"model": load(file)["model"], "args": Namespace(model=MODEL)}
    with pytest.raises(UserError, match="does not fit"):
        build_as_trained(Checkpoint(content, "c"), model="test_vit")


def test_the_teachers_outputs_are_put_in_the_students_order(file):
    args = parse_args(["--teacher-model", MODEL, "--teacher-path", str(file)])
    classes = ["class2", "class0"]
    teacher = build_teacher(args, 2, "cpu", classes)
    images = torch.randn(2, 3, 16, 16)
    whole = build_teacher(args, 3, "cpu", ["class0", "class1", "class2"])
    assert torch.equal(teacher(images), whole(images)[:, [2, 0]])
    with pytest.raises(UserError, match=r"1 classes of the data \(cat\)"):
        build_teacher(args, 2, "cpu", ["class0", "cat"])


# labels


def test_folders_of_some_of_the_classes(file, data, tmp_path, capsys):
    for name in ("class1", "class2"):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / name).symlink_to(data / "val" / name)
    argv = ("--eval", "--data-path", str(tmp_path), "--resume")
    assert run(*argv, str(file)) == 0
    named = capsys.readouterr().out
    assert "the data have 2 of the 3 classes" in named
    images = build_dataset("val", root=data, transform=eval_transform(16))
    network = deit.load(file)
    right = [
        bool(network(image).argmax() == label)
        for image, label in build_eval_loader(images, batch_size=1, device="cpu")
        if label > 0
    ]
    assert f"Acc@1 {100 * sum(right) / len(right):.3f} " in named

    nameless = load(file)
    del nameless["class_names"]
    torch.save(nameless, tmp_path / "nameless.pth")
    assert run(*argv, str(tmp_path / "nameless.pth"), "--nb-classes", "3") == 2
    assert "2 classes" in (error := capsys.readouterr().err)
    assert "--class-map FILE" in error
    (tmp_path / "map.txt").write_text("class0\nclass1\nclass2\n")
    mapped = ("--class-map", str(tmp_path / "map.txt"))
    assert run(*argv, str(tmp_path / "nameless.pth"), *mapped) == 0
    assert scores(capsys.readouterr().out) == scores(named)
    (tmp_path / "val" / "other").symlink_to(data / "val" / "class0")
    assert run(*argv, str(file)) == 2
    assert "1 classes of the data (other)" in capsys.readouterr().err


def scores(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("*"))


def test_a_classifier_for_other_classes_is_not_taken(file, data, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number, name in enumerate(("cat", "dog", "owl")):
            (tmp_path / split / name).symlink_to(data / split / f"class{number}")
    argv = ("--data-path", str(tmp_path), "--epochs", "1", "--warmup-epochs", "0")
    assert run("--finetune", str(file), *argv) == 0
    assert "initialised anew (head" in capsys.readouterr().out
    assert run("--resume", str(file), *argv) == 2
    assert "3 classes of the data (cat, dog, owl)" in capsys.readouterr().err


def test_published_training_goes_on_with_some_of_imagenets_classes(data, tmp_path, capsys):
    """Its file has no names: the labels are ImageNet's, not the order of the folders."""
    synsets = ImageNetInfo("imagenet-1k").label_names()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in range(3):
            target = data / split / f"class{number}"
            (tmp_path / split / synsets[500 + number]).symlink_to(target)
    argv = (*OPTIONS, "--nb-classes", "1000")
    assert train(*argv, data=tmp_path, out=tmp_path / "out") == 0
    published = load(tmp_path / "out" / "checkpoint.pth")
    del published["class_names"]
    torch.save(published, tmp_path / "out" / "checkpoint.pth")
    more = ("--resume", "auto", "--epochs", "2")
    assert train(*OPTIONS, *more, data=tmp_path, out=tmp_path / "out") == 0
    assert "the data have 3 of the 1000 classes of ImageNet-1K" in capsys.readouterr().out
    assert load(tmp_path / "out" / "checkpoint.pth")["class_names"] == synsets


# what cannot be scored


def test_weights_that_are_not_finite(file, data, tmp_path, capsys):
    broken = load(file)
    broken["model"]["head.weight"][0, 0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="infinite or NaN"):
        deit.load(tmp_path / "nan.pth")
    for argv in (("--eval", "--resume"), ("--eval", "--finetune"), ("--resume",), ("--finetune",)):
        assert run(*argv, str(tmp_path / "nan.pth"), "--data-path", str(data)) == 2
        error = capsys.readouterr().err
        assert "weights that are infinite or NaN, in 1 tensor (head.weight)" in error
        assert error.count("\n") == 1


def test_logits_that_are_not_finite(file, data, monkeypatch, capsys):
    from deit.train import evaluation

    def overflow(*args, **kwargs):
        model, *rest = build(*args, **kwargs)
        model.register_forward_hook(lambda module, inputs, logits: logits / 0)
        return model, *rest

    build = evaluation.build_model
    monkeypatch.setattr(evaluation, "build_model", overflow)
    assert run("--eval", "--resume", str(file)) == 2
    assert "the logits of 17 of 17 images are infinite or NaN" in capsys.readouterr().err


# mirrored images


def test_flop_eval(file, data, tmp_path, capsys):
    """A mirror-invariant network gives each image and its mirror image the same answer."""
    assert run("--eval", "--resume", str(file), "--flop-eval") == 0
    line = scores(capsys.readouterr().out)
    accuracy = line.split("Acc@1 ")[1].split()[0]
    assert line.endswith(f"mirrored Acc@1 {accuracy} same answer 100.000")
    ordinary = ("--model", "test_vit", "--input-size", "32", "--data-path", str(data))
    assert run("--eval", *ordinary, "--flop-eval") == 0
    assert float(scores(capsys.readouterr().out).split()[-1]) < 100
