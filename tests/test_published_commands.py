"""The command lines of the published scripts, as people have them: they parse, and mean the same.

What each sets is in the recipes too, so both must come to the same options.
"""

from __future__ import annotations

import pytest

from deit.cli import CommandLine, OptionGroup
from deit.errors import UserError
from deit.launch.recipes import load_recipe, options_to_argv
from deit.launch.spec import make_spec
from deit.train.args import get_parser, parse_args

BOTH = (
    "--epochs 400 --sched cosine --input-size 224 --color-jitter 0.3 --eval-crop-ratio 1.0 "
    "--warmup-epochs 5 --drop 0.0 --opt fusedlamb --warmup-lr 1e-6 --mixup .8 --cutmix 1.0 "
    "--unscale-lr --repeated-aug --high-precision-matmul --fused-attn --no-zip-dataloader --compile"
)
VIT = (
    f"{BOTH} --lr 3e-3 --weight-decay 0.02 --reprob 0.0 --smoothing 0.0 --bce-loss --ThreeAugment "
    "--use-amp"
)
RESMLP = (
    f"{BOTH} --lr 5e-3 --weight-decay 0.2 --reprob 0.25 --smoothing 0.1 "
    "--aa rand-m9-mstd0.5-inc1 --no-use-amp"
)
CONVNEXT = (
    "--lr 4e-3 --warmup_epochs 50 --model_ema true --model_ema_eval true --num_workers 15 "
    "--use_amp True --compile --high-precision-matmul"
)
# name: nodes of four GPUs, what is its own
LINES = {
    "d2_deit_small_patch16_LS": (4, VIT, "--batch 128 --drop-path 0.0 --seed 1242 --tgpu A100"),
    "d2_deit_base_patch16_LS": (1, VIT, "--batch 512 --drop-path 0.1 --seed 0 --tgpu A100fat"),
    "d2_deit_large_patch16_LS": (8, VIT, "--batch 64 --drop-path 0.4 --seed 1337 --tgpu A100"),
    "d2_deit_huge_patch14_LS":
        (8, VIT, "--batch 64 --drop-path 0.5 --seed 1337 --time 0-32:00:00"),
    "hybrid_deit_small_patch16_LS": (2, VIT, "--batch 256 --drop-path 0.1 --seed 0"),
    "hybrid_deit_base_patch16_LS": (4, VIT, "--batch 128 --drop-path 0.1 --seed 1337"),
    "hybrid_deit_large_patch16_LS": (4, VIT, "--batch 128 --drop-path 0.4 --seed 1337"),
    "hybrid_deit_huge_patch14_LS":
        (8, VIT, "--batch-size 64 --drop-path 0.5 --seed 0 --num_workers 15 --job_dir out/x"),
    "resmlp_equi_d2_12":
        (2, RESMLP, "--batch 256 --drop-path 0.05 --seed 0 --num_workers 32 --tgpu A100"),
    "resmlp_equi_d2_24": (2, RESMLP, "--batch 256 --drop-path 0.2 --seed 1337 --tgpu A100"),
    "resmlp_equi_d2_B_24": (4, RESMLP, "--batch 128 --drop-path 0.2 --seed 0"),
    "resmlp_equi_d2_L_24": (8, RESMLP, "--batch 64 --drop-path 0.2 --seed 0"),
    "resmlpL_24": (8, RESMLP, "--batch 64 --drop-path 0.2 --seed 0"),
    "d2_convnext_isotropic_small": (4, CONVNEXT, "--drop_path 0.1 --batch_size 128 "
                                    "--update_freq 2 --layer_scale_init_value 0"),
    "d2_convnext_isotropic_base": (4, CONVNEXT, "--drop_path 0.2 --batch_size 256 "
                                   "--update_freq 1 --layer_scale_init_value 0"),
    "d2_convnext_isotropic_large":
        (8, CONVNEXT, "--drop_path 0.5 --batch_size 64 --update_freq 2"),
}  # fmt: skip
# ConvNeXt's own lines for its hierarchical networks, with the names of the equivariant ones.
HIERARCHICAL = {
    "d2_convnext_tiny": "--drop_path 0.1 --batch_size 128 --update_freq 2",
    "d2_convnext_small": "--drop_path 0.4 --batch_size 128 --update_freq 2",
    "d2_convnext_base": "--drop_path 0.5 --batch_size 128 --update_freq 2 --auto_resume false",
}


@pytest.fixture(autouse=True)
def _no_user_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEIT_CLUSTER", raising=False)


@pytest.mark.parametrize("name", LINES)
def test_a_published_line_is_its_recipe(name):
    nodes, script, own = LINES[name]
    words = f"--nodes {nodes} --ngpus 4 --model {name} --data-path imagenet {script} {own}".split()
    script = "convnext" if "convnext" in name else "deit"
    spec = make_spec([*words, "--published", script, "--job-dir", "x"])
    typed = vars(spec.tasks[0].args)
    recipe = load_recipe(name)
    options = recipe.options | {"data_path": "imagenet"}
    wanted = vars(parse_args(options_to_argv(options, get_parser())))
    assert spec.processes == recipe.gpus
    assert spec.global_batch == recipe.global_batch
    different = {key for key in wanted if typed[key] != wanted[key]}
    # LAMB by its other name; fused attention, which ResMLP does not have
    assert different <= {"published", "opt", *(["fused_attn"] if "resmlp" in name else [])}
    assert typed["opt"] in ("fusedlamb", "adamw")


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_values_after_switches(name):
    words = f"--model {name} --data_path x {CONVNEXT} {HIERARCHICAL[name]}".split()
    args = parse_args([*words, "--published", "convnext"])
    assert (args.model_ema, args.use_amp, args.compile) == (True,) * 3
    assert args.model_ema_eval == "both"
    assert (args.update_freq, args.warmup_epochs, args.lr, args.unscale_lr) == (2, 50, 4e-3, True)
    assert args.auto_resume == (name != "d2_convnext_base")
    assert args.compile_mode == "max-autotune"


def test_every_option_of_the_convnext_script():
    line = (
        "--warmup_steps 7 --crop_pct 0.9 --model_key model_ema|model --model_prefix backbone. "
        "--data_set image_folder --data_path a --eval_data_path b --nb_classes 5 "
        "--imagenet_default_mean_and_std false --log_dir c --auto_resume true --output_dir d "
        "--save_ckpt true --save_ckpt_freq 2 --save_ckpt_num 3 --disable_eval no "
        "--enable_wandb 1 --project p --wandb_ckpt True --pin_mem False --eval false"
    )
    args = parse_args(line.split())
    assert (args.warmup_steps, args.eval_crop_ratio) == (7, 0.9)
    assert (args.save_freq, args.save_ckpt_num) == (2, 3)
    assert (args.model_key, args.model_prefix) == ("model_ema|model", "backbone.")
    assert (args.resume, args.wandb, args.wandb_ckpt, args.project) == ("auto", True, True, "p")
    off = (args.pin_mem, args.eval, args.disable_eval, args.imagenet_default_mean_and_std)
    assert off == (False,) * 4
    assert parse_args(["--warmup_steps", "-1"]).warmup_steps == -1


def test_options_of_the_published_launchers():
    line = "--use_volta32 --timeout 36 --job_name mine --constraint ib --comment soon --nodes 1"
    asked = make_spec(line.split()).asked
    assert (asked.constraint, asked.job_name, asked.time) == ("ib&volta32gb", "mine", 36 * 60)
    assert make_spec(["--timeout", "0.5"]).asked.time == 30
    with pytest.raises(UserError, match="--timeout and --time"):
        make_spec(["--timeout", "3", "--time", "1-0"])


def test_what_is_given_wins_over_a_published_script():
    args = parse_args(["--published", "convnext", "--data-path", "x", "--no-auto-resume"])
    assert (args.lr, args.min_lr) == (4e-3, 1e-6)
    assert (args.auto_resume, args.model) == (False, "convnext_tiny")
    args = parse_args(["--published", "convnext", "--lr", "1", "--model-ema"])
    assert (args.lr, args.model_ema, args.warmup_epochs) == (1, True, 20)


def test_a_switch_takes_true_and_false():
    parser = CommandLine(prog="x")
    OptionGroup(parser, "g").switch("--on --alias", "a switch")
    for words, expected in {
        "": False, "--on": True, "--on true": True, "--on=Yes": True, "--on 0": False,
        "--on off": False, "--no-on": False, "--no-on false": True, "--alias t": True,
        "--no-alias": False,
    }.items():  # fmt: skip
        assert parser.parse_args(words.split()).on is expected, words
    with pytest.raises(UserError, match="'maybe' is not one of true, false"):
        parser.parse_args(["--on", "maybe"])
