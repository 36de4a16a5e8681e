"""Every published training: the recipe files against the published table, typed in here again."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from deit.errors import UserError
from deit.launch.recipes import (
    RECIPES,
    load_recipe,
    options_to_argv,
    recipe_names,
    split_batch,
)
from deit.train.args import get_parser, parse_args


class Row(NamedTuple):
    family: str
    batch: int
    gpus: int
    accumulation: int
    drop_path: float
    top1: float | None
    other: dict


TABLE = {
    "d2_deit_small_patch16_LS": Row("vit", 128, 16, 1, 0.0, None, {"seed": 1242}),
    "d2_deit_base_patch16_LS": Row("vit", 512, 4, 1, 0.1, 82.2, {"seed": 0}),
    "d2_deit_large_patch16_LS": Row("vit", 64, 32, 1, 0.4, 83.4, {"seed": 1337}),
    "d2_deit_huge_patch14_LS": Row("vit", 64, 32, 1, 0.5, 84.4, {"seed": 1337}),
    "hybrid_deit_small_patch16_LS": Row("vit", 256, 8, 1, 0.1, None, {"seed": 0}),
    "hybrid_deit_base_patch16_LS": Row("vit", 128, 16, 1, 0.1, 83.0, {"seed": 1337}),
    "hybrid_deit_large_patch16_LS": Row("vit", 128, 16, 1, 0.4, 84.5, {"seed": 1337}),
    "hybrid_deit_huge_patch14_LS": Row("vit", 64, 32, 1, 0.5, 85.0, {"seed": 0}),
    "resmlp_equi_d2_12": Row(
        "resmlp", 256, 8, 1, 0.05, 72.0, {"num_workers": 32, "freeze_shift": True}
    ),
    "resmlp_equi_d2_24": Row("resmlp", 256, 8, 1, 0.2, 74.9, {"seed": 1337, "freeze_shift": True}),
    "resmlp_equi_d2_B_24": Row("resmlp", 128, 16, 1, 0.2, 80.8, {"freeze_shift": True}),
    "resmlp_equi_d2_L_24": Row("resmlp", 64, 32, 1, 0.2, 81.5, {"freeze_shift": True}),
    "resmlpL_24": Row("resmlp", 64, 32, 1, 0.2, 80.4, {"freeze_shift": False}),
    "d2_convnext_isotropic_small": Row(
        "convnext", 128, 16, 2, 0.1, 76.8, {"layer_scale_init_value": 0}
    ),
    "d2_convnext_isotropic_base": Row(
        "convnext", 256, 16, 1, 0.2, 81.3, {"layer_scale_init_value": 0}
    ),
    "d2_convnext_isotropic_large": Row(
        "convnext", 64, 32, 2, 0.5, 82.6, {"layer_scale_init_value": 1e-6}
    ),
}
FAMILIES = {
    "vit": {
        "global_batch": 2048,
        "opt": "lamb",
        "lr": 3e-3,
        "unscale_lr": True,
        "weight_decay": 0.02,
        "sched": "cosine",
        "epochs": 400,
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "reprob": 0,
        "color_jitter": 0.3,
        "smoothing": 0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "repeated_aug": True,
        "bce_loss": True,
        "ThreeAugment": True,
        "eval_crop_ratio": 1.0,
        "fused_attn": True,
        "decay_as_compiled": True,
        "sched_as_published": "deit",
        "use_amp": True,
        "amp_dtype": "float16",
        "high_precision_matmul": True,
        "compile": True,
        "compile_mode": "max-autotune",
    },
    "resmlp": {
        "global_batch": 2048,
        "opt": "lamb",
        "lr": 5e-3,
        "unscale_lr": True,
        "weight_decay": 0.2,
        "epochs": 400,
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "smoothing": 0.1,
        "repeated_aug": True,
        "bce_loss": False,
        "ThreeAugment": False,
        "sched_as_published": "deit",
        "use_amp": False,
        "high_precision_matmul": True,
        "compile": True,
        "compile_mode": "max-autotune",
    },
    "convnext": {
        "global_batch": 4096,
        "opt": "adamw",
        "lr": 4e-3,
        "unscale_lr": True,
        "weight_decay": 0.05,
        "epochs": 300,
        "warmup_epochs": 50,
        "sched": "cosine",
        "min_lr": 1e-6,
        "color_jitter": 0.4,
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "model_ema": True,
        "model_ema_decay": 0.9999,
        "model_ema_eval": "both",
        "bce_loss": False,
        "sched_as_published": "convnext",
        "repeated_aug": False,
        "eval_crop_ratio": 0.875,
        "eval_warp_from": 384,
        "use_amp": True,
        "amp_dtype": "float16",
        "high_precision_matmul": True,
        "compile": True,
        "compile_mode": "max-autotune",
    },
}


def test_table_and_folder_name_the_same_recipes():
    assert recipe_names() == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_recipe_resolves_to_the_published_options(name):
    row, recipe = TABLE[name], load_recipe(name)
    argv = [*options_to_argv(recipe.options, get_parser()), "--data-path", "imagenet"]
    args = vars(parse_args(argv))
    wanted = dict(FAMILIES[row.family])
    assert recipe.gpus == row.gpus
    assert recipe.global_batch == wanted.pop("global_batch")
    wanted |= {
        "model": name,
        "data_set": "IMNET",
        "input_size": 224,
        "batch_size": row.batch,
        "update_freq": row.accumulation,
        "drop_path": row.drop_path,
        **row.other,
    }
    assert {key: args[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", TABLE)
def test_recipe_opens_with_command_hardware_duration_and_accuracy(name):
    row = TABLE[name]
    head = re.match(r"(?:#.*\n)+", (RECIPES / f"{name}.toml").read_text())[0]
    facts = dict(re.findall(r"^# (Command|Hardware|Duration|Published) +(.+)$", head, re.M))
    assert facts["Command"].startswith(f"python deit/run_with_submitit.py --recipe {name} ")
    assert facts["Hardware"].startswith(f"{row.gpus} x A100, {row.batch} images a GPU")
    assert facts["Hardware"].endswith(f"batch {row.batch * row.gpus * row.accumulation}")
    assert facts["Duration"] == ("32 h" if name == "d2_deit_huge_patch14_LS" else "not published")
    assert facts["Published"].startswith(f"{row.top1} % top-1" if row.top1 else "top-1 not pub")


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
        (4, {"batch_size": 100}, r"512 each, which --batch-size 100 does not divide; these do: 1"),
        (4, {"update_freq": 3}, r"--update-freq 3 does not divide"),
        (4, {"batch_size": 64, "update_freq": 2}, r"not --batch-size 64 x --update-freq 2"),
    ],
)
def test_split_that_cannot_keep_the_global_batch_says_so(processes, given, message):
    with pytest.raises(UserError, match=message):
        split_batch(2048, processes, largest=128, **given)


def test_own_recipe_file_overrides_its_bases(tmp_path):
    (tmp_path / "top.toml").write_text("[options]\nlr = 1e-3\nepochs = 7\n")
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
    ],
)
def test_broken_recipe_is_a_user_error(tmp_path, text, message):
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(own))


def test_misspelt_names_are_suggested():
    with pytest.raises(UserError, match="did you mean d2_deit_base_patch16_LS"):
        load_recipe("d2_deit_bas_patch16_LS")
    with pytest.raises(UserError, match=r"no option 'weight_decai'; did you mean weight_decay"):
        options_to_argv({"weight_decai": 1}, get_parser())


def test_options_become_arguments():
    options = {"lr": 3e-3, "compile": True, "repeated_aug": False, "opt_betas": [0.9, 0.99]}
    options |= {"model_kwargs": {"depth": 2}}  # a table
    argv = ["--lr", "0.003", "--compile", "--no-repeated-aug", "--opt-betas", "0.9", "0.99"]
    argv += ["--model-kwargs", "depth=2"]
    assert options_to_argv(options, get_parser()) == argv
