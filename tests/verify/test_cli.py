"""The command line: exit codes, tables, checkpoints."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

import deit.models  # noqa: F401 - registers the networks
from deit.errors import UserError, one_line_errors
from deit.verify import cli
from deit.verify.layers import LAYER_CASES
from deit.verify.mutations import MUTATIONS, VIT, Mutation
from deit.verify.networks import NetworkCase

ROOT = Path(__file__).resolve().parents[2]
NAME = "d2_deit_tiny_patch16_LS"


@pytest.fixture
def few(monkeypatch):
    """One layer and one small network."""
    monkeypatch.setattr(cli, "LAYER_CASES", LAYER_CASES[:1])
    monkeypatch.setattr(cli, "DEFAULT", [VIT])


def run(*argv: str) -> int:
    return one_line_errors(lambda: cli.main(argv))


def test_what_holds_exits_with_zero(few, capsys):
    assert run("--seed", "1") == 0
    output = capsys.readouterr().out
    assert "all 5 checks held" in output  # one layer, one network in four arithmetics
    for word in (
        "float64",
        "float32",
        "bfloat16",
        "amp bfloat16",
        "worst at",
        "ordinary twin",
        "d2_deit_tiny",
    ):
        assert word in output


def test_what_fails_exits_with_one_and_is_named(few, monkeypatch, capsys):
    def broken():
        layer = LAYER_CASES[0].build()
        layer.linear_asym.bias = torch.nn.Parameter(torch.ones(layer.linear_asym.out_features))
        return layer

    monkeypatch.setattr(cli, "LAYER_CASES", [replace(LAYER_CASES[0], layer=broken)])
    assert run("--dtype", "float32") == 1
    output = capsys.readouterr().out
    assert "1 of 2 checks FAILED" in output
    assert "FAILED: Linear: float32: the whole (Linear): error" in output


def test_a_check_that_crashes_fails_and_the_others_go_on(few, monkeypatch, capsys):
    def crash(x):
        raise RuntimeError("no such\nkernel")

    def crashing():
        layer = LAYER_CASES[0].build()
        layer.forward = crash
        return layer

    case = replace(LAYER_CASES[0], variant="crashing", layer=crashing)
    monkeypatch.setattr(cli, "LAYER_CASES", [case, LAYER_CASES[0]])
    assert run("--dtype", "float32") == 1
    output = capsys.readouterr().out
    assert "1 of 3 checks FAILED" in output
    assert "FAILED: Linear, crashing: RuntimeError: no such kernel" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "d2_deit_tini_patch16_LS"], "did you mean d2_deit_tiny_patch16_LS"),
        (["--model", "deit_tiny_patch16_LS"], "is an ordinary network"),
        (["--model", "resnet50"], "is an ordinary network"),
        (["--dtype", "float8"], "invalid choice"),
        (["--compile-mode", "fast"], "invalid choice"),
        (["--self-test", "--compile-mode", "default"], "--self-test breaks networks of its own"),
        (["--device", "toaster"], "the device 'toaster' cannot be used"),
        (["--batch", "1"], "must be from 2"),
        (["--img-size", "100"], "cannot be cut into patches"),
        (["--amp", "--dtype", "bfloat16"], "--amp keeps parameters in float32"),
        (["--self-test", "--model", NAME], "--self-test breaks networks of its own"),
        (["--checkpoint", "missing.pth"], "the file does not exist"),
        (["--checkpoint", "x.pth", "--model", NAME, "d2_convnext_tiny"], "give one --model"),
        (["--chekpoint", "x.pth"], "unrecognized arguments"),
    ],
)
def test_wrong_input_exits_with_two_and_one_line(argv, message, capsys):
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_the_script_runs_without_install(tmp_path):
    """From another folder, as users do."""
    command = [sys.executable, str(ROOT / "test_equivariance.py"), "--model", "resnet50"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "is an ordinary network" in done.stderr


def test_the_self_test_lists_what_it_broke_and_found(monkeypatch, capsys):
    """Each break itself is tried in test_equivariance.py."""
    monkeypatch.setattr(cli.mutations, "MUTATIONS", MUTATIONS[:2])
    monkeypatch.setattr(cli.mutations, "INTACT", (VIT,))
    assert run("--self-test", "--dtype", "float32") == 0
    output = capsys.readouterr().out
    assert "all 3 checks held" in output
    assert "kernel not mirrored" in output


def test_a_self_test_fails_where_a_break_is_not_found_or_located_elsewhere(monkeypatch, capsys):
    def break_another(block):
        block.mlp.forward = lambda x: x[::-1]

    harmless = Mutation(torch.nn.Module, "nothing", VIT, "blocks.1", lambda layer: None)
    elsewhere = Mutation(torch.nn.Module, "the layer inside", VIT, "blocks.1", break_another)
    monkeypatch.setattr(cli.mutations, "MUTATIONS", (harmless, elsewhere))
    monkeypatch.setattr(cli.mutations, "INTACT", ())
    assert run("--self-test", "--dtype", "float64") == 1
    output = capsys.readouterr().out
    assert "FAILED: network: nothing: not noticed" in output
    assert "broken is blocks.1, blamed is blocks.1.mlp" in output


def save(path, name, args=None, **options) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options)
    torch.save({"model": model.state_dict()} | ({"args": args} if args else {}), path)
    return path


def test_a_checkpoint_is_checked_with_the_options_it_needs(few, tmp_path, capsys):
    file = save(
        tmp_path / "a.pth", NAME, argparse.Namespace(model=NAME, input_size=64),
        img_size=64, use_attn_mixer=True, use_symmetrized_asym_feats=True,
    )  # fmt: skip
    assert run("--checkpoint", str(file), "--dtype", "float64") == 0
    assert f"{NAME}, checkpoint" in capsys.readouterr().out
    assert run("--checkpoint", str(file), "--dtype", "float64", "--img-size", "96") == 0


def test_the_size_of_a_bare_state_dict_is_read_off_its_tokens(few, tmp_path):
    file = save(tmp_path / "b.pth", NAME, img_size=(64, 96))
    assert run("--checkpoint", str(file), "--model", NAME, "--dtype", "float64") == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("d2_convnext_isotropic_small", {"layer_scale_init_value": 1e-6}),
        ("d2_convnext_isotropic_small", {"use_symmetrized_asym_feats": True}),
        ("resmlp_equi_d2_12", {"img_size": 64}),
    ],
)
def test_checkpoints_of_the_other_families(few, tmp_path, name, options):
    file = save(tmp_path / "c.pth", name, argparse.Namespace(model=name, input_size=64), **options)
    assert run("--checkpoint", str(file)) == 0


def test_a_checkpoint_of_another_network_is_refused(few, tmp_path, capsys):
    file = save(tmp_path / "d.pth", NAME)
    assert run("--checkpoint", str(file)) == 2
    assert "does not say which model it is" in capsys.readouterr().err
    assert run("--checkpoint", str(file), "--model", "d2_deit_small_patch16_LS") == 2
    assert "does not fit" in capsys.readouterr().err


def test_amp_rounds_to_half_precision(few, capsys):
    assert run("--amp") == 0
    assert "amp bfloat16" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_networks_are_checked(few, monkeypatch, capsys):
    case = replace(VIT, options={"depth": 1})
    monkeypatch.setattr(cli, "DEFAULT", [case])
    assert run("--compile") == 0
    assert "compiled" in capsys.readouterr().out


def test_networks_are_not_built_for_sizes_they_cannot_take():
    with pytest.raises(UserError, match="cannot be built"):
        NetworkCase("resmlp_equi_d2_12", img_size=(30, 30)).build()
