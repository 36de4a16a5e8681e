"""The command line: exit codes, tables, checkpoints."""

import argparse
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from deit.equivariance import map_parts
from deit.errors import one_line_errors
from deit.verify import cli
from deit.verify.layers import LAYER_CASES
from deit.verify.mutations import MUTATIONS, VIT, Mutation
from deit.verify.networks import network_case

ROOT = Path(__file__).resolve().parents[2]
NAME = "d2_deit_tiny_patch16_LS"


@pytest.fixture
def few(monkeypatch):
    """One layer and one small network."""
    case = network_case(NAME, "1 block", (64, 96), depth=1)
    monkeypatch.setattr(cli.layers, "LAYER_CASES", LAYER_CASES[:1])
    monkeypatch.setattr(cli.networks, "default_networks", lambda size: [case])


def run(*argv: str) -> int:
    return one_line_errors(lambda: cli.main(argv))


@pytest.mark.parametrize(
    ("argv", "checks", "words"),
    [
        # one layer, one network in four arithmetics
        ("--seed 1", 5, f"float64,float32,bfloat16,amp bfloat16,seed 1,ordinary twin,{NAME}"),
        ("--amp", 2, "amp bfloat16,worst at"),
        ("--compile", 2, "compiled (default)"),
        ("--compile-blocks", 2, "block by block"),
    ],
)
def test_what_holds_exits_with_zero(few, monkeypatch, capsys, argv, checks, words):
    # Inductor's code takes a minute to make
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert run(*argv.split()) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in [f"all {checks} checks held", *words.split(",")]), output


def test_compiling_may_not_change_the_output(few, monkeypatch, capsys):
    def larger(function, **options):
        def compiled(*args, **kwargs):
            y = function(*args, **kwargs)
            return y if isinstance(y, list) else map_parts(lambda part: 1.1 * part, y)

        return compiled

    monkeypatch.setattr(torch, "compile", larger)
    assert run("--compile") == 1
    output = capsys.readouterr().out
    assert "2 of 2 checks FAILED" in output
    assert output.count("FAILED: ") == output.count("compiling changes the output: error") == 2


def test_what_fails_or_crashes_exits_with_one_and_is_named(few, monkeypatch, capsys):
    def broken():
        layer = LAYER_CASES[0].build()
        layer.linear_asym.bias = nn.Parameter(torch.ones(layer.linear_asym.out_features))
        return layer

    def crashing():
        raise RuntimeError("no such\nkernel")

    changed = {"broken": broken, "crashing": crashing, "intact": LAYER_CASES[0].build}
    cases = [replace(LAYER_CASES[0], variant=v, build=build) for v, build in changed.items()]
    monkeypatch.setattr(cli.layers, "LAYER_CASES", cases)
    assert run("--dtype", "float32") == 1
    output = capsys.readouterr().out
    assert "2 of 4 checks FAILED" in output
    assert "FAILED: Linear, broken: float32: the whole (Linear): error" in output
    assert "FAILED: Linear, crashing: RuntimeError: no such kernel" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model d2_deit_tini_patch16_LS", f"did you mean {NAME}"),
        ("--model resnet50", "is an ordinary network"),
        ("--compile-mode fast", "invalid choice"),
        ("--self-test --compile-mode default", "--self-test breaks networks of its own"),
        ("--device toaster", "'toaster' is not one of auto, cpu"),
        ("--batch 1", "must be at least 2 and at most 256"),
        ("--img-size 100", "cannot be cut into patches"),
        ("--amp --dtype bfloat16", "--amp keeps parameters in float32"),
        (f"--self-test --model {NAME}", "--self-test breaks networks of its own"),
        ("--checkpoint missing.pth", "the file does not exist"),
        (f"--checkpoint x.pth --model {NAME} d2_convnext_tiny", "give one --model"),
        ("--model-kwargs depth=2", "is for the network of a --checkpoint"),
    ],
)
def test_wrong_input_exits_with_two_and_one_line(argv, message, capsys):
    assert run(*argv.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_the_script_from_another_folder(tmp_path, monkeypatch, capsys):
    script = str(ROOT / "test_equivariance.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--model", "resnet50"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2
    assert "is an ordinary network" in capsys.readouterr().err


def test_the_self_test_fails_where_a_break_is_not_found_or_located_elsewhere(monkeypatch, capsys):
    """The breaks that it has are each tried in test_equivariance.py."""

    def break_another(block, x):
        block.__self__.mlp.forward = lambda x: x[::-1]
        return block(x)

    def harmless(original, *args):
        return original(*args)

    broken = partial(Mutation, nn.Module, case=VIT, where="blocks.1")
    changed = [
        MUTATIONS[0],
        broken("nothing", change=harmless),
        broken("nothing in training", change=harmless, in_training=True),
        broken("the layer inside", change=break_another),
    ]
    monkeypatch.setattr(cli.mutations, "MUTATIONS", changed)
    monkeypatch.setattr(cli.mutations, "INTACT", (VIT,))
    assert run("--self-test", "--dtype", "float64") == 1
    output = capsys.readouterr().out
    for words in ("3 of 5 checks FAILED", "kernel not mirrored",
                  "FAILED: network: nothing: not noticed",
                  "FAILED: network: nothing in training: not noticed",
                  "broken is blocks.1, blamed is blocks.1.mlp"):  # fmt: skip
        assert words in output


def save(path, name, says=None, **options) -> str:
    model = timm.create_model(name, num_classes=7, **options)
    args = {"args": argparse.Namespace(model=name, **says)} if says is not None else {}
    torch.save({"model": model.state_dict(), **args}, path)
    return str(path)


SHALLOW = {"input_size": 64, "model_kwargs": [("depth", 1)]}


@pytest.mark.parametrize(
    ("name", "options", "says", "argv"),
    [
        (NAME, {"img_size": 64, "use_attn_mixer": True, "use_symmetrized_asym_feats": True},
         {"input_size": 64}, "--img-size 96 --model-kwargs depth=1"),
        # the size is read off the tokens
        (NAME, {"img_size": (64, 96)}, None, f"--model {NAME} --model-kwargs depth=1"),
        ("d2_convnext_isotropic_small", {"layer_scale_init_value": 1e-6}, SHALLOW, ""),
        ("resmlp_equi_d2_12", {"img_size": 64}, SHALLOW, ""),
    ],
)  # fmt: skip
def test_a_checkpoint_is_checked_with_the_options_it_needs(
    few, tmp_path, capsys, name, options, says, argv
):
    file = save(tmp_path / "a.pth", name, says, depth=1, **options)
    assert run("--checkpoint", file, *argv.split()) == 0
    assert f"{name}, checkpoint" in capsys.readouterr().out


def test_a_checkpoint_of_another_network_is_refused(tmp_path, capsys):
    file = save(tmp_path / "d.pth", NAME, depth=1)
    assert run("--checkpoint", file) == 2
    assert "does not say which model it is" in capsys.readouterr().err
    assert run("--checkpoint", file, "--model", "d2_deit_small_patch16_LS") == 2
    assert "does not fit" in capsys.readouterr().err
