"""Every published training: the recipe files against the published table, typed in here again."""

from __future__ import annotations

import re

import pytest

from deit.errors import UserError
from deit.launch.recipes import RECIPES, load_recipe, options_to_argv, recipe_names, split_batch
from deit.train.args import get_parser, parse_args

# Published top-1 of each recipe; `test_published_commands.py` has the command lines.
TOP1 = {
    "d2_deit_small_patch16_LS": None,
    "d2_deit_base_patch16_LS": 82.2,
    "d2_deit_large_patch16_LS": 83.4,
    "d2_deit_huge_patch14_LS": 84.4,
    "hybrid_deit_small_patch16_LS": None,
    "hybrid_deit_base_patch16_LS": 83.0,
    "hybrid_deit_large_patch16_LS": 84.5,
    "hybrid_deit_huge_patch14_LS": 85.0,
    "resmlp_equi_d2_12": 72.0,
    "resmlp_equi_d2_24": 74.9,
    "resmlp_equi_d2_B_24": 80.8,
    "resmlp_equi_d2_L_24": 81.5,
    "resmlpL_24": 80.4,
    "d2_convnext_isotropic_small": 76.8,
    "d2_convnext_isotropic_base": 81.3,
    "d2_convnext_isotropic_large": 82.6,
}
# What the published scripts do that no command line of theirs says.
SCRIPTS = {
    "deit": {
        "amp_dtype": "float16", "compile_mode": "max-autotune", "decay_as_compiled": True,
        "sched_as_published": "deit",
    },
    "convnext": {
        "model": "convnext_tiny", "drop_path": 0.0, "layer_scale_init_value": 1e-6,
        "model_ema": False, "model_ema_decay": 0.9999, "use_amp": False, "amp_dtype": "float16",
        "compile_mode": "max-autotune", "decay_as_compiled": True, "lr": 4e-3,
        "unscale_lr": True, "warmup_epochs": 20, "sched_as_published": "convnext",
        "min_lr": 1e-6, "color_jitter": 0.4, "repeated_aug": False, "eval_crop_ratio": 0.875,
        "eval_warp_from": 384, "auto_resume": True, "save_freq": 1, "save_ckpt_num": 3,
        "project": "convnext",
    },
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_scripts_differ_in_these_options(script):
    published, own = (vars(parse_args(words)) for words in (["--published", script], []))
    del published["published"]
    different = {name: value for name, value in published.items() if value != own[name]}
    assert different == SCRIPTS[script]
    shifts = parse_args(["--published", script, "--model", "resmlp_equi_d2_12"])
    assert shifts.freeze_shift


@pytest.mark.parametrize("name", TOP1)
def test_recipe_opens_with_command_hardware_duration_and_accuracy(name):
    recipe, top1 = load_recipe(name), TOP1[name]
    head = re.match(r"(?:#.*\n)+", (RECIPES / f"{name}.toml").read_text())[0]
    facts = dict(re.findall(r"^# (Command|Hardware|Duration|Published) +(.+)$", head, re.M))
    assert facts["Command"].startswith(f"python deit/run_with_submitit.py --recipe {name} ")
    batch = recipe.options["batch_size"]
    assert facts["Hardware"].startswith(f"{recipe.gpus} x A100, {batch} images a GPU")
    assert facts["Hardware"].endswith(f"batch {recipe.global_batch}")
    assert facts["Duration"] == ("32 h" if name == "d2_deit_huge_patch14_LS" else "not published")
    assert facts["Published"].startswith(f"{top1} % top-1" if top1 else "top-1 not pub")


@pytest.mark.parametrize(
    ("total", "processes", "largest", "given", "split"),
    [
        (2048, 16, 128, {}, (128, 1)),
        (2048, 4, 128, {}, (128, 4)),
        (2048, 64, 128, {}, (32, 1)),
        (2048, 2, 100, {}, (64, 16)),  # 100 fits the GPU but does not divide 1024
        (1536, 8, 128, {}, (96, 2)),
        (2048, 4, 128, {"batch_size": 256}, (256, 2)),
        (2048, 4, 128, {"update_freq": 8}, (64, 8)),
        (2048, 4, 128, {"batch_size": 64, "update_freq": 8}, (64, 8)),
    ],
)
def test_split_keeps_the_global_batch(total, processes, largest, given, split):
    batch, accumulation = split_batch(total, processes, largest=largest, **given)
    assert (batch, accumulation) == split
    assert batch * accumulation * processes == total


@pytest.mark.parametrize(
    ("processes", "given", "message"),
    [
        (24, {}, r"2048 cannot be split evenly over 24 processes; 16 or 32 would do"),
        (
            4,
            {"batch_size": 100},
            r"512 each, which --batch-size 100 does not divide: .* one of 1, 2",
        ),
        (4, {"update_freq": 3}, r"which --update-freq 3 does not divide"),
        (4, {"batch_size": 64, "update_freq": 2}, r"--batch-size 64 x --update-freq 2 does not"),
    ],
)
def test_split_that_cannot_keep_the_global_batch_says_so(processes, given, message):
    with pytest.raises(UserError, match=message):
        split_batch(2048, processes, largest=128, **given)


def test_own_recipe_file_overrides_its_bases(tmp_path):
    (tmp_path / "top.toml").write_text("gpus = 8\n[options]\nlr = 1e-3\nepochs = 7\n")
    (tmp_path / "mid.toml").write_text('base = "top"\ngpus = 2\n[options]\nepochs = 8\n')
    own = tmp_path / "own.toml"
    own.write_text('base = "mid"\n[options]\nmodel = "m"\nbatch_size = 4\n')
    recipe = load_recipe(str(own))
    assert recipe.options == {"lr": 1e-3, "epochs": 8, "model": "m", "batch_size": 4}
    assert (recipe.name, recipe.gpus, recipe.global_batch) == ("own", 2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus = = 3", "is not valid TOML"),
        ('base = "own"', "has itself as a base"),
        ('base = "nowhere"', "cannot read recipe"),
        ("gpu = 4", "unknown gpu; known are base, gpus, options"),
        ('gpus = 4\n[options]\nmodel = "m"', "has no batch_size"),
        ('[options]\ngpus = 4\nmodel = "m"\nbatch_size = 4', "has no gpus"),
        ("options = 3", "options is a table, not 3"),
        ('gpus = "4"\n[options]\nmodel = "m"\nbatch_size = 4', "gpus is '4', and must be"),
        ('gpus = 4\n[options]\nmodel = "m"\nbatch_size = 0', "batch_size is 0, and must be"),
    ],
)
def test_broken_recipe_is_a_user_error(tmp_path, text, message):
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(own))


def test_names():
    assert recipe_names() == sorted(TOP1)
    with pytest.raises(UserError, match="did you mean d2_deit_base_patch16_LS"):
        load_recipe("d2_deit_bas_patch16_LS")


def test_options_become_arguments():
    options = {"lr": 3e-3, "compile": True, "repeated_aug": False, "opt_betas": [0.9, 0.99]}
    options |= {"model_kwargs": {"depth": 2}}  # a table
    argv = ["--lr", "0.003", "--compile", "--no-repeated-aug", "--opt-betas", "0.9", "0.99"]
    argv += ["--model-kwargs", "depth=2"]
    assert options_to_argv(options, get_parser()) == argv
