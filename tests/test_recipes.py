"""Published trainings: the recipes, and the command lines of the scripts, as people have them.

All is typed in from the publications, and not from the recipe files.
"""

from __future__ import annotations

import json
import re
import shlex

import pytest

from deit.cli import CommandLine, OptionGroup
from deit.errors import UserError
from deit.launch.recipes import RECIPES, load_recipe, options_to_argv, recipe_names, split_batch
from deit.launch.spec import make_spec
from deit.launch.submit import dry_run
from deit.train.args import get_parser, parse_args

pytestmark = pytest.mark.usefixtures("no_cluster_file")
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
# name: top-1 in per cent if it is published, nodes of four GPUs, options of all, its own
PUBLISHED = {
    "d2_deit_small_patch16_LS":
        (None, 4, VIT, "--batch 128 --drop-path 0.0 --seed 1242 --tgpu A100"),
    "d2_deit_base_patch16_LS":
        (82.2, 1, VIT, "--batch 512 --drop-path 0.1 --seed 0 --tgpu A100fat"),
    "d2_deit_large_patch16_LS":
        (83.4, 8, VIT, "--batch 64 --drop-path 0.4 --seed 1337 --tgpu A100"),
    "d2_deit_huge_patch14_LS":
        (84.4, 8, VIT, "--batch 64 --drop-path 0.5 --seed 1337 --time 0-32:00:00"),
    "hybrid_deit_small_patch16_LS": (None, 2, VIT, "--batch 256 --drop-path 0.1 --seed 0"),
    "hybrid_deit_base_patch16_LS": (83.0, 4, VIT, "--batch 128 --drop-path 0.1 --seed 1337"),
    "hybrid_deit_large_patch16_LS": (84.5, 4, VIT, "--batch 128 --drop-path 0.4 --seed 1337"),
    "hybrid_deit_huge_patch14_LS":
        (85.0, 8, VIT, "--batch-size 64 --drop-path 0.5 --seed 0 --num_workers 15 --job_dir out/x"),
    "resmlp_equi_d2_12":
        (72.0, 2, RESMLP, "--batch 256 --drop-path 0.05 --seed 0 --num_workers 32 --tgpu A100"),
    "resmlp_equi_d2_24": (74.9, 2, RESMLP, "--batch 256 --drop-path 0.2 --seed 1337 --tgpu A100"),
    "resmlp_equi_d2_B_24": (80.8, 4, RESMLP, "--batch 128 --drop-path 0.2 --seed 0"),
    "resmlp_equi_d2_L_24": (81.5, 8, RESMLP, "--batch 64 --drop-path 0.2 --seed 0"),
    "resmlpL_24": (80.4, 8, RESMLP, "--batch 64 --drop-path 0.2 --seed 0"),
    "d2_convnext_isotropic_small": (76.8, 4, CONVNEXT, "--drop_path 0.1 --batch_size 128 "
                                    "--update_freq 2 --layer_scale_init_value 0"),
    "d2_convnext_isotropic_base": (81.3, 4, CONVNEXT, "--drop_path 0.2 --batch_size 256 "
                                   "--update_freq 1 --layer_scale_init_value 0"),
    "d2_convnext_isotropic_large":
        (82.6, 8, CONVNEXT, "--drop_path 0.5 --batch_size 64 --update_freq 2"),
}  # fmt: skip
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_its_published_command(name):
    top1, nodes, script, own = PUBLISHED[name]
    recipe = make_spec(["--recipe", name, "--data-path", "imagenet"])
    words = f"--nodes {nodes} --ngpus 4 --model {name} --data-path imagenet {script} {own}".split()
    script = "convnext" if "convnext" in name else "deit"
    published = make_spec([*words, "--published", script, "--job-dir", "x"])
    assert published.processes == recipe.processes == load_recipe(name).gpus
    assert published.global_batch == recipe.global_batch
    wanted, typed = (vars(spec.tasks[0].args) for spec in (recipe, published))
    different = {key for key in wanted if typed[key] != wanted[key]}
    # LAMB by its other name; fused attention, which ResMLP does not have
    assert different <= {"published", "opt", *(["fused_attn"] if "resmlp" in name else [])}
    assert typed["opt"] in ("fusedlamb", "adamw")

    head = re.match(r"(?:#.*\n)+", (RECIPES / f"{name}.toml").read_text())[0]
    facts = dict(re.findall(r"^# (Command|Hardware|Duration|Published) +(.+)$", head, re.M))
    assert facts["Command"].startswith(f"python deit/run_with_submitit.py --recipe {name} ")
    hardware = f"{4 * nodes} x A100, {typed['batch_size']} images a GPU"
    assert facts["Hardware"].startswith(hardware)
    assert facts["Hardware"].endswith(f"batch {published.global_batch}")
    assert facts["Duration"] == ("32 h" if name == "d2_deit_huge_patch14_LS" else "not published")
    assert facts["Published"].startswith(f"{top1} % top-1" if top1 else "top-1 not pub")

    shown = dry_run(recipe)
    by_hand = shlex.split(shown.splitlines()[-1])
    assert by_hand[0] == "torchrun"
    assert vars(parse_args(by_hand[by_hand.index("deit/main.py") + 1 :])) == wanted
    configuration = json.loads(shown[shown.index("{\n") : shown.rindex("}\n") + 1])
    assert (configuration["model"], configuration["output_dir"]) == (name, "runs/%j")


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_scripts_differ_in_these_options(script):
    published, own = (vars(parse_args(words)) for words in (["--published", script], []))
    del published["published"]
    different = {name: value for name, value in published.items() if value != own[name]}
    assert different == SCRIPTS[script]
    shifts = parse_args(["--published", script, "--model", "resmlp_equi_d2_12"])
    assert shifts.freeze_shift


def test_what_is_given_wins_over_a_published_script():
    words = "--published convnext --data-path x --auto_resume false --lr 1 --model-ema"
    args = parse_args(words.split())
    given = (args.auto_resume, args.lr, args.model_ema)
    assert (*given, args.warmup_epochs, args.min_lr) == (False, 1, True, 20, 1e-6)


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
        (2048, 24, 128, {}, "2048 cannot be split evenly over 24 processes; 16 or 32 would do"),
        (2048, 1000000, 128, {}, "over 1000000 processes; 2048 would do"),
        (2048, 4, 128, {"batch_size": 100},
         "512 each, which --batch-size 100 does not divide: .* one of 1, 2"),
        (2048, 4, 128, {"update_freq": 3}, "which --update-freq 3 does not divide"),
        (2048, 4, 128, {"batch_size": 64, "update_freq": 2},
         "--batch-size 64 x --update-freq 2 does not"),
    ],
)  # fmt: skip
def test_split_keeps_the_global_batch_or_says_what_would(total, processes, largest, given, split):
    if isinstance(split, str):
        with pytest.raises(UserError, match=split):
            split_batch(total, processes, largest=largest, **given)
    else:
        assert split_batch(total, processes, largest=largest, **given) == split


def test_own_recipe_file_overrides_its_bases(tmp_path):
    (tmp_path / "top.toml").write_text("gpus = 8\n[options]\nlr = 1e-3\nepochs = 7\n")
    (tmp_path / "mid.toml").write_text('base = "top"\ngpus = 2\n[options]\nepochs = 8\n')
    own = tmp_path / "own.toml"
    own.write_text(
        'base = "mid"\n[options]\nmodel = "m"\nbatch_size = 4\ncompile = true\n'
        "repeated_aug = false\nwarmup_steps = -1\nopt_betas = [0.9, 0.99]\n"
        "model_kwargs = {depth = 2}\n"
    )
    recipe = load_recipe(str(own))
    assert (recipe.name, recipe.gpus, recipe.global_batch) == ("own", 2, 8)
    words = "--lr 0.001 --epochs 8 --model m --batch-size 4 --compile --no-repeated-aug "
    words += "--warmup-steps=-1 --opt-betas 0.9 0.99 --model-kwargs depth=2"
    assert options_to_argv(recipe.options, get_parser()) == words.split()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus = = 3", "is not valid TOML"),
        ('base = "own"', "has itself as a base"),
        ('base = "nowhere"', "cannot read recipe"),
        ("gpu = 4", "unknown gpu; known are base, gpus, options"),
        ('gpus = 4\n[options]\nmodel = "m"', "has no batch_size"),
        ("gpus = 4\n[options]\nbatch_size = 4", "has no model"),
        ('[options]\nmodel = "m"\nbatch_size = 4', "has no gpus"),
        ("[options]\ngpus = 4", r"recipe .*own\.toml: there is no option 'gpus'"),
        ('[options]\nlr = "x"', r"recipe .*own\.toml: argument --lr: 'x' is not a number"),
        ("options = 3", "options is a table, not 3"),
        ('gpus = "4"\n[options]\nmodel = "m"\nbatch_size = 4', "gpus is '4', and must be"),
        ('gpus = 4\n[options]\nmodel = "m"\nbatch_size = "4"', "batch_size is '4', and must"),
        ("[options]\nbatch_size = 0", "--batch-size: 0 is out of range"),
    ],
)
def test_broken_recipe_is_a_user_error(tmp_path, text, message):
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(own))


def test_names():
    assert recipe_names() == sorted(PUBLISHED)
    with pytest.raises(UserError, match="did you mean d2_deit_base_patch16_LS"):
        load_recipe("d2_deit_bas_patch16_LS")
