"""Options that reach further than the command line: what they change in a training."""

import pytest
import torch
from torch._functorch import config as functorch_config
from training_runs import TINY, differences, make_images, run, train

from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.build import build_model, mean_and_std, set_precision
from deit.train.checkpoint import read_checkpoint
from deit.train.folder import read_log

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"))


def test_without_evaluation_the_test_images_are_not_needed(data, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(data / "train")
    more = ("--disable-eval", "--save-ckpt-freq", "1", "--save-ckpt-num", "2", "--epochs", "4")
    more += ("--log-dir", str(tmp_path / "events"), "--num-workers", "99")
    out = tmp_path / "out"
    told = run(*more, data=tmp_path / "data", out=out)
    files = sorted(path.name for path in out.glob("*.pth"))
    assert files == ["checkpoint.pth", "checkpoint_0002.pth", "checkpoint_0003.pth"]
    assert "test_acc1" not in (out / "log.txt").read_text()
    assert any((tmp_path / "events").iterdir())
    assert not (out / "tensorboard").exists()
    assert "as many as this process has cores" in told


def test_image_folder_reads_what_imnet_reads(data, tmp_path):
    more = ("--epochs", "1", "--imagenet_default_mean_and_std", "false")
    # 26 images are six updates: after six of twelve steps of warm-up the rate is halfway.
    more += ("--warmup-steps", "12", "--warmup-lr", "0", "--sched", "constant")
    assert train(*more, data=data, out=tmp_path / "one") == 0
    folders = ("--data_set", "image_folder", "--eval_data_path", str(data / "val"))
    words = (*more, *folders, "--no-save-ckpt")
    assert train(*words, data=data / "train", out=tmp_path / "other") == 0
    one, other = (read_log(tmp_path / name)[0] for name in ("one", "other"))
    assert differences(one, other) == []
    assert 0.4e-3 < one["train_lr"] <= 0.5e-3
    assert not list((tmp_path / "other").glob("*.pth"))
    assert train("--eval", *folders[2:], data=data) == 0
    assert mean_and_std(parse_args(more)) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("words", "matmul", "convolutions"),
    [
        ([], "highest", True),
        (["--high-precision-matmul"], "high", True),
        (["--full-float32"], "highest", False),
    ],
)
def test_float32_precision(words, matmul, convolutions, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not convolutions)
    set_precision(parse_args(words), CUDA)
    assert (chosen, torch.backends.cudnn.allow_tf32) == ([matmul], convolutions)


def test_activation_memory_budget():
    words = ["--activation-memory-budget", "0.3"]
    # Not by monkeypatch, which takes the setting away from torch's configuration when it undoes.
    with functorch_config.patch(activation_memory_budget=1.0):
        set_precision(parse_args(["--compile", *words]), torch.device("cpu"))
        assert functorch_config.activation_memory_budget == 0.3
    assert functorch_config.activation_memory_budget == 1.0


def test_the_compile_mode_reaches_torch(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    words = ("--compile", "--compile-mode", "max-autotune", "--epochs", "1")
    assert train(*words, data=data, out=tmp_path) == 0
    assert asked == [{"mode": "max-autotune"}] * 2, "the network and its average"
    resume = ("--eval", "--resume", str(tmp_path / "checkpoint.pth"))
    assert train(*resume, "--compile-mode", "reduce-overhead", data=data) == 0
    assert train(*resume, "--compile-blocks", data=data) == 0
    assert asked[2:] == [{"mode": "reduce-overhead"}] + [{}] * 6, "the network, its blocks"


@pytest.mark.parametrize(
    ("model", "option"),
    [
        ("resmlp_12", "--fused-attn"),
        ("d2_convnext_tiny", "--attn-mixer"),
        ("test_vit", "--symmetrized-asym-feats"),
    ],
)
def test_options_of_another_family_are_noted(model, option):
    size = () if model == "test_vit" else ("--input-size", "224")
    args = parse_args([*TINY, "--model", model, option, *size])
    with torch.device("meta"):
        _, notes = build_model(args, 10)
    assert f"{model} has no {option}: it has no effect" in notes


def test_weights_in_a_file_of_another_layout(tmp_path):
    path = tmp_path / "x.pth"
    weights = {"backbone.a": torch.ones(2), "head.b": torch.zeros(1)}
    torch.save({"module": weights, "epoch": 3}, path)
    checkpoint = read_checkpoint(path, key="model|module")
    assert checkpoint["model"].keys() == weights.keys()
    assert checkpoint.which() == "the trained weights (module)"
    assert read_checkpoint(path, key="module", prefix="backbone.")["model"].keys() == {"a"}
    with pytest.raises(UserError, match="neither a 'model'"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="no weights whose names begin with 'neck'"):
        read_checkpoint(path, key="module", prefix="neck")
    torch.save({"model": weights, "model_ema": weights}, path)
    average = read_checkpoint(path, key="model_ema")
    assert average.which() == "the average of the weights (model_ema)"
    with pytest.raises(UserError, match=r"has no 'nosuch'.*it has 'model', 'model_ema'"):
        read_checkpoint(path, key="nosuch")
    torch.save(weights, path)
    assert read_checkpoint(path, key="model|module")["model"].keys() == weights.keys()
