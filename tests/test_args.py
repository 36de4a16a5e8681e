"""The command line: published options and defaults, spellings, errors, implications."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

import pytest

from deit.cli import OptionGroup
from deit.errors import UserError
from deit.train.args import config_dict, get_parser, parse_args

# The published options and their defaults, as the Namespace holds them.
PUBLISHED = {
    "batch_size": 64, "epochs": 300, "seed": 0, "device": "auto", "output_dir": "", "resume": "",
    "start_epoch": 0, "eval": False, "num_workers": 10, "pin_mem": True,
    "input_size": 224, "drop": 0, "drop_path": 0.1, "symmetrized_asym_feats": False,
    "attn_mixer": False, "layer_scale_init_value": None, "head_init_scale": 1,
    "model_ema": True, "model_ema_decay": 0.99996, "model_ema_force_cpu": False,
    "model_ema_eval": False, "use_amp": True, "compile": False, "high_precision_matmul": False,
    "opt": "adamw", "opt_eps": 1e-8, "opt_betas": None, "clip_grad": None, "momentum": 0.9,
    "weight_decay": 0.05, "weight_decay_end": None, "layer_decay": 1.0, "update_freq": 1,
    "sched": "cosine", "lr": 5e-4, "unscale_lr": False, "warmup_lr": 1e-6, "warmup_epochs": 5,
    "min_lr": 1e-5, "decay_epochs": 30, "cooldown_epochs": 10, "patience_epochs": 10,
    "decay_rate": 0.1, "lr_noise": None, "lr_noise_pct": 0.67, "lr_noise_std": 1.0,
    "color_jitter": 0.3, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1,
    "train_interpolation": "bicubic", "repeated_aug": True, "ThreeAugment": False, "src": False,
    "reprob": 0.25, "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0.8,
    "cutmix": 1.0, "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
    "mixup_mode": "batch", "bce_loss": False, "cosub": False, "teacher_model": "regnety_160",
    "teacher_path": "", "distillation_type": "none", "distillation_alpha": 0.5,
    "distillation_tau": 1.0, "finetune": "", "attn_only": False, "train_mode": True,
    "data_path": "", "inat_category": "name", "eval_crop_ratio": 1.0, "zip_dataloader": False,
    "world_size": 1, "dist_url": "env://", "wandb": False,
}  # fmt: skip


def test_every_published_option_has_its_default_and_both_spellings():
    parser, args = get_parser(), vars(parse_args([]))
    assert {name: args[name] for name in PUBLISHED} == PUBLISHED
    assert args["data_set"] == "SAMPLE", "without --data-path the bundled sample is meant"
    options = {option for action in parser._actions for option in action.option_strings}
    for name, default in PUBLISHED.items():
        assert f"--{name.replace('_', '-')}" in options
        if isinstance(default, bool):
            assert f"--no-{name.replace('_', '-')}" in options
            flag = f"--no_{name}" if default else f"--{name}"
            assert getattr(parser.parse_args([flag]), name) is not default, name


def test_published_prefixes_stay_unique():
    names = {"batch": "batch_size", "num": "num_workers", "input": "input_size", "epoch": "epochs"}
    names |= {"weight-decay-": "weight_decay_end", "mom": "momentum", "start": "start_epoch"}
    names |= {"eval-c": "eval_crop_ratio", "warmup-l": "warmup_lr", "warmup-e": "warmup_epochs"}
    names |= {"decay-r": "decay_rate", "dr": "decay_rate", "update": "update_freq"}
    given = {p: get_parser().parse_args([f"--{p}", "1"]).given for p in [*names, "out"]}
    assert given == {prefix: {name} for prefix, name in (names | {"out": "output_dir"}).items()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--modle x", "--modle x; did you mean --model"),
        ("--lr -1", "--lr: -1 is out of range, it must be at least 0 "),
        ("--lr fast", "--lr: 'fast' is not a number"),
        ("--lr nan", "--lr: 'nan' is not finite"),
        ("--dist-timeout -1", "--dist-timeout: -1 is out of range, it must be above 0 "),
        ("--clip-grad 0", "--clip-grad: 0 is out of range, it must be above 0 "),
        ("--epochs 0", "--epochs: 0 is out of range, it must be at least 1 "),
        ("--batch-size 1.5", "--batch-size: '1.5' is not a whole number"),
        ("--drop-path 1.2", "--drop-path: 1.2 is .* it must be at least 0 and at most 1 "),
        ("--amp-dtype float8", "float8.*bfloat16"),
        ("--device gpu", "'gpu'.*cuda"),
        ("--attn-mixer --fused-attn", "--attn-mixer cannot be used with --fused-attn"),
        ("--batch-size 63", "--batch-size 63 is odd, but mixup"),
        ("--cosub --distillation-type hard", "--cosub cannot .* --distillation-type"),
        ("--opt-betas 0.9 1", "less than 1"),
        ("--lr-noise 0.1 0.2 0.3", "a start and an end, got 3"),
        ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax 0.8 0.2: "),
        ("--cutmix-minmax 0.5 0.5", "the first must be the smaller one"),
        ("--warmup-prefix --epochs 5", "--warmup-prefix leaves no .* 5 of --epochs 5"),
        ("--seed 99999999999999999999", "at least 0 and at most 1e[+]18"),
        ("--resume auto", "in --output-dir"),
        ("--resume auto --overwrite --output-dir x", "--overwrite removes what --resume auto"),
        ("--auto-resume --overwrite --output-dir x", "--overwrite removes what --resume auto"),
        ("--eval-data-path x", "--data-set IMNET needs --data-path"),
        ("--data-set image_folder --eval-data-path x", "image_folder needs --data-path"),
        ("--model-kwargs num_classes=9", "--nb-classes"),
        ("--finetune auto", "'auto' is for --resume"),
        ("--fold", "--fold is for --eval"),
        ("--resume-weights-only", "--resume-weights-only needs --resume"),
        ("--data-set CIFAR", "--data-set CIFAR100 needs --data-path"),
        ("--zip-dataloader", "--zip-dataloader needs --data-path"),
        ("--zip-dataloader --data-set INAT --data-path x", "not --data-set INAT"),
        ("--download --data-path x", "--download fetches CIFAR and FASHION, not --data-set IMNET"),
        ("--warmup 3", "--warmup.*could match --warmup-lr, --warmup-epochs"),
        ("--full-float32 --high-precision-matmul", "--full-float32 forbids"),
        ("--activation-memory-budget 0.3", "add --compile"),
        ("--activation-memory-budget 2", "at most 1 "),
        ("--eval --disable-eval", "--eval evaluates, which --disable-eval forbids"),
        ("--data-path x --data-set image_folder", "image_folder needs --eval-data-path"),
        ("--data-path x --data-set CIFAR --eval-data-path x", "IMNET or image_folder"),
        ("--wandb-ckpt --wandb", "--wandb-ckpt uploads checkpoints"),
        ("--wandb-ckpt --output-dir x", "--wandb-ckpt uploads checkpoints"),
        ("--model-ema-eval neither", "'neither' is not one of true, false, both"),
        ("--no-model-ema-eval both", "--no-model-ema-eval cannot be 'both'"),
        ("--model-kwargs depth", "'depth' is not of the form key=value"),
    ],
)
def test_wrong_command_lines_are_one_clear_error(words, message):
    with pytest.raises(UserError, match=message) as error:
        parse_args(words.split())
    assert "\n" not in str(error.value)


NO_AUG = {"aa": "", "ThreeAugment": False, "src": False, "repeated_aug": False}
NO_AUG |= {"color_jitter": 0, "hflip": 0, "reprob": 0}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data-path x", {"data_set": "IMNET"}),
        ("--eval --eval-data-path x", {"data_set": "IMNET", "data_path": ""}),
        ("--eval --data-set image_folder --eval-data-path x", {"data_set": "image_folder"}),
        ("--published convnext --output-dir x", {"resume": "auto"}),
        ("--published convnext --output-dir x --overwrite", {"resume": ""}),
        ("--weight_decay_end=0.1 --output_dir=a_b/c --no_pin_mem",
         {"weight_decay_end": 0.1, "output_dir": "a_b/c", "pin_mem": False}),
        ("--drop-path 1", {"drop_path": 1}),
        ("--data-set IMNETZIP --data-path x", {"data_set": "IMNET", "zip_dataloader": True}),
        ("--data-set CIFAR --data-path x", {"data_set": "CIFAR100"}),
        ("--data-set SAMPLE --data-path x", {"data_path": ""}),
        ("--aa none", {"aa": "", "hflip": 0.5}),
        ("--bce-loss", {"smoothing": 0}),  # smoothed targets would all count as 1
        ("--cosub", {"smoothing": 0.1}),
        ("--no-aug --ThreeAugment --reprob 0.5", NO_AUG),
        ("--ThreeAugment", {"reprob": 0}),
        ("--ThreeAugment --reprob 0.1", {"reprob": 0.1}),  # which is noted
        ("--model-ema-eval", {"model_ema_eval": True}),
        ("--no-model-ema-eval", {"model_ema_eval": False}),
        ("--model-ema-eval=both", {"model_ema_eval": "both"}),
        ("--model_ema_eval both --lr 1", {"model_ema_eval": "both", "lr": 1}),
        ("--model-ema-eval --lr 1", {"model_ema_eval": True, "lr": 1}),
        ("--batch-size 63 --mixup 0 --cutmix 0", {"batch_size": 63}),
        ("--batch-size 63 --eval", {"batch_size": 63}),
        ("--batch-size 63 --mixup-prob 0", {"batch_size": 63}),
        ("--model-kwargs depth=4 mlp_ratio=2.5 global_pool=avg x=(1,2)",
         {"model_kwargs": [("depth", 4), ("mlp_ratio", 2.5), ("global_pool", "avg"),
                           ("x", (1, 2))]}),
    ],
)  # fmt: skip
def test_what_options_mean_and_imply(words, expected):
    args = vars(parse_args(words.split()))
    assert {name: args[name] for name in expected} == expected


def test_help_shows_every_option_with_its_default_those_of_a_script_too():
    parser = get_parser(prog="launch")
    OptionGroup(parser, "cluster").add("--nodes", int, 2, "N", "nodes, 100 % of them")
    args = parse_args(["--nodes", "4", "--batch", "8"], parser)
    assert (args.nodes, args.batch_size) == (4, 8)
    text = parser.format_help()
    assert "nodes, 100 % of them (default: 2)" in text
    for action in parser._actions[1:]:
        assert all(option in text for option in action.option_strings)
        assert action.help.count("(default: ") == 1, action.option_strings


def test_config_dict_is_json():
    args = parse_args(["--cutmix-minmax", "0.2", "0.8"])
    args.job_dir, args.nested, args.pair = Path("a/b"), Namespace(x=1), (1, 2)
    config = json.loads(json.dumps(config_dict(args)))
    expected = {"job_dir": "a/b", "nested": {"x": 1}, "pair": [1, 2], "cutmix_minmax": [0.2, 0.8]}
    assert {name: config[name] for name in expected} == expected
    assert list(config) == sorted(config)


def test_what_stood_on_the_command_line_is_known():
    args = parse_args(["--epo", "300", "--no_aug", "--mixup", "0", "--model-kwargs", "depth=2"])
    assert args.given == {"epochs", "aug", "mixup", "model_kwargs"}
    assert "given" not in vars(args)
    assert pickle.loads(pickle.dumps(args)).given == args.given
    assert parse_args([]).given == set()
