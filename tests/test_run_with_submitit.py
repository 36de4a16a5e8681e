"""The launcher without a cluster: what it would submit, and what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from training_runs import make_images

from deit.cli import Switch
from deit.errors import UserError, one_line_errors
from deit.launch import submit as submit_module
from deit.launch.preflight import check
from deit.launch.spec import JobSpec, make_spec
from deit.launch.submit import dry_run
from deit.run_with_submitit import run
from deit.train.args import get_parser

pytestmark = pytest.mark.usefixtures("no_cluster_file")
REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTER_FILE = """
partition = "gpu"
account = "proj"
ngpus = 4
time = "1-0"
cpus_per_task = 16
setup = ["module load CUDA"]
job_dir = "~/jobs/%j"
[options]
data_path = "/data/imagenet"
num_workers = 14
[sbatch]
exclude = "bad[1-3]"
requeue = false
hold = false
exclusive = true
"""


def spec(*argv: str) -> JobSpec:
    return make_spec(argv)


def sbatch_flags(text: str) -> dict[str, str]:
    flags = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    return {
        name: shlex.split(value)[0] if value else ""
        for name, _, value in (flag.partition("=") for flag in flags)
    }


def test_the_original_command_and_its_defaults():
    made = spec("--model", "deit_small_patch16_LS", "--batch", "64", "--lr", "5e-4")
    flags = sbatch_flags(dry_run(made))
    wanted = {"nodes": "2", "ntasks-per-node": "8", "gres": "gpu:A100:8", "cpus-per-task": "10"}
    wanted |= {"time": str(72 * 60), "signal": "USR2@120", "requeue": ""}
    assert flags.items() >= wanted.items()
    assert made.global_batch == 64 * 16
    assert not {"partition", "account", "qos", "constraint", "mem", "hold"} & flags.keys()
    for tgpu, gres in (("none", None), ("any", "gpu:8"), ("H100", "gpu:H100:8")):
        assert sbatch_flags(dry_run(spec("--tgpu", tgpu))).get("gres") == gres


def test_every_cluster_option_reaches_sbatch():
    words = "--partition=gpu --account=proj --qos=long --constraint=ib&big --mem=64G --nodes=3 "
    words += "--mail-user=me@here --mail-type=END,FAIL --cpus-per-task=3 --job-name=mine"
    given = dict(word[2:].split("=") for word in words.split()) | {"comment": "a b"}
    words = [*words.split(), "--comment=a b", "--ngpus=2", "--signal-delay=77", "--time=1:30"]
    words += ["--setup", "module load A", "--setup", "source env/bin/activate"]
    text = dry_run(spec(*words))
    wanted = given | {"ntasks-per-node": "2", "signal": "USR2@77", "time": "2"}
    assert sbatch_flags(text).items() >= wanted.items()
    assert "\nmodule load A\nsource env/bin/activate\n" in text
    assert " --kill-on-bad-exit=1 " in text


def test_precedence_is_command_line_recipe_cluster_file_default(monkeypatch, tmp_path):
    (tmp_path / "cluster.toml").write_text(CLUSTER_FILE)
    monkeypatch.setenv("DEIT_CLUSTER", str(tmp_path / "cluster.toml"))
    words = ["--recipe", "resmlp_equi_d2_12", "--no-compile", "--account", "mine"]
    made = spec(*words, "--setup", "module load X", "--epochs", "3")
    args, text = made.tasks[0].args, dry_run(made)
    assert args.num_workers == 32  # the recipe's
    assert (args.epochs, args.compile, args.data_path) == (3, False, "/data/imagenet")
    assert "\nmodule load CUDA\nmodule load X\n" in text
    assert made.asked.job_dir == os.path.expanduser("~/jobs/%j")
    flags = sbatch_flags(text)
    wanted = {"partition": "gpu", "account": "mine", "time": "1440", "cpus-per-task": "16"}
    wanted |= {"nodes": "2", "ntasks-per-node": "4"}  # 8 GPUs, four a node
    wanted |= {"exclude": "bad[1-3]", "exclusive": ""}
    assert flags.items() >= wanted.items()
    assert not {"requeue", "hold"} & flags.keys()  # turned off


def test_cluster_file_by_option_environment_or_home_folder(monkeypatch, tmp_path):
    (tmp_path / ".config/deit").mkdir(parents=True)
    files = {"home": tmp_path / ".config/deit/cluster.toml"}
    files |= {name: tmp_path / f"{name}.toml" for name in ("environment", "option")}
    assert spec().asked.partition is None
    for name, path in files.items():
        path.write_text(f'partition = "{name}"\n')
    assert spec().asked.partition == "home"
    monkeypatch.setenv("DEIT_CLUSTER", str(files["environment"]))
    assert spec().asked.partition == "environment"
    assert spec("--cluster-file", str(files["option"])).asked.partition == "option"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('partitoin = "x"', "no option 'partitoin'; did you mean partition"),
        ("lr = 1", "no option 'lr'"),  # it belongs under [options]
        ('nodes = "two"', "argument --nodes: 'two' is not a whole number"),
        ("nodes = true", "argument --nodes: 'True' is not a whole number"),
        ('partition = ["a", "b"]', "unrecognized arguments: b"),
        ("sbatch = 3", "options and sbatch are tables"),
        (
            "[options]\nlearning_rat = 1",
            r"cluster file .*c\.toml: there is no option 'learning_rat'",
        ),
        (None, r"cannot read cluster file .*/c\.toml"),
    ],
)
def test_wrong_cluster_file(monkeypatch, tmp_path, text, message):
    monkeypatch.setenv("DEIT_CLUSTER", str(tmp_path / "c.toml"))
    if text:
        (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        spec()


def test_other_machines_keep_the_global_batch():
    words = ["--recipe", "d2_deit_large_patch16_LS", "--nodes", "1", "--ngpus", "4", "--dry-run"]
    made = spec(*words)
    assert (made.tasks[0].args.batch_size, made.tasks[0].args.update_freq) == (64, 8)
    assert made.global_batch == 2048
    assert "/path/to/imagenet" in dry_run(made)


def test_array_over_seeds_and_models():
    made = spec("--array", "seed=0-2,7", "--nodes", "1")
    assert [task.args.seed for task in made.tasks] == [0, 1, 2, 7]
    assert sbatch_flags(dry_run(made))["array"] == "0-3%4"
    own = ["--job-dir", "runs/%A/%a", "--output-dir", "out/%j"]
    made = spec("--array", "model=deit_base_patch16_LS,d2_deit_base_patch16_LS", *own)
    models = [task.args.model for task in made.tasks]
    assert models == ["deit_base_patch16_LS", "d2_deit_base_patch16_LS"]


def test_slurm_times_in_minutes():
    times = {"0-72:00:00": 4320, "90": 90, "1:30": 2, "02:00:00": 120, "0-0:0:30": 1}
    times |= {"1-12": 36 * 60, "1-0:30": 24 * 60 + 30}
    assert {text: spec("--time", text).asked.time for text in times} == times


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes 0", "--nodes: 0 is out of range, it must be at least 1"),
        ("--local --nodes 2", "--local is one machine: --nodes 2"),
        ("--bach-size 3", "unrecognized arguments: --bach-size.*did you mean --batch-size"),
        ("--model x --lr fast", "'fast' is not a number"),
        ("--attn-mixer --fused-attn", "--attn-mixer cannot be used with --fused-attn"),
        ("--array seed=0-1 --job-dir /same/for/all", "--job-dir /same/for/all: .* need %j in it"),
        ("--array seed=0-1 --output-dir same --job-dir a/%a", "--output-dir same: .* need %j in"),
        ("--timeout 3 --time 1-0", "--timeout and --time"),
        ("--recipe resmlpL_24", "trains on ImageNet: give --data-path"),
        ("--recipe resmlpL_24 --dry-run --batch 100", "--batch-size 100 does not divide"),
        *((f"--time={text}", "argument --time: ") for text in
          ("", "3h", "1-", "-5", "0", "1:2:3:4", "0-00:00:00")),
        *((f"--array={text}", "--array") for text in
          ("seed", "seed=", "seed=a", "seed=3-1", "seed=1,1", "lr=1", "model=a,")),
    ],
)  # fmt: skip
def test_wrong_command_lines(words, message):
    with pytest.raises(UserError, match=message):
        spec(*words.split())


def test_local_takes_one_cpu_process_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    made = spec("--local", "--model", "m")
    assert (made.asked.nodes, made.asked.ngpus, made.gres) == (1, 1, None)
    assert made.command(made.tasks[0]).startswith("python deit/main.py ")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert spec("--local", "--model", "m").gres == "gpu:4"


def test_without_slurm_jobs_are_shown_but_not_started(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", "resmlp_equi_d2_24", "--nodes", "2", "--data-path", "x"]
    run([*words, "--dry-run"])
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    run([*words, "--print-command"])
    torchrun = "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 "
    torchrun += "--nproc-per-node 8 deit/main.py "
    assert capsys.readouterr().out.startswith(torchrun)
    assert one_line_errors(lambda: run(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch("error: .*no sbatch command.* --local .*\n", shown.err)
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_loads_neither_torch_nor_submitit():
    code = (
        "import sys; from deit.run_with_submitit import run; "
        "run(['--recipe', 'resmlpL_24', '--print-command']); "
        "loaded = {'torch', 'timm', 'submitit'} & set(sys.modules); "
        "sys.modules['submitit'] = None; print(loaded, file=sys.stderr); run([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.startswith("set()\n")
    assert done.stderr.endswith("UserError: starting jobs needs the package submitit: "
                                "pip install submitit\n")  # fmt: skip


def sample_words(action) -> list[str]:
    """A value for an option that is not its default."""
    flag = action.option_strings[0]
    if isinstance(action, Switch):
        return [flag if not action.default else action.option_strings[-1]]
    if action.dest == "model_kwargs":
        return [flag, "depth=2", "x=(1, 2)", flag, "s='4'", "pool=avg", "neg=-1", "none=None"]
    if action.dest == "device":
        return [flag, "cuda:1"]
    if action.choices:
        return [flag, next(word for word in action.choices[::-1] if word != action.default)]
    try:
        action.type("0.5")
        words = ["0.35", "0.75"]
    except ArgumentTypeError:
        words = ["7", "8"]
    if action.type is str:
        words = ["a b=-c %j", "d"]
    count = {"+": 2, 2: 2}.get(action.nargs, 1)
    return [flag, *words[:count]]


def test_every_option_of_main_passes_through_unchanged(monkeypatch):
    """Each with a value of its own; the parser's words come out as the same options."""
    monkeypatch.setattr("deit.train.args.validate", lambda args: None)  # some exclude each other
    actions = [a for a in get_parser()._actions if a.dest != "help"]
    assert len(actions) > 100
    words = [word for action in actions for word in sample_words(action)]
    words += ["--no-repeated_aug", "--opt_betas=0.9", "--epo", "3"]  # any spelling
    made = spec(*words, "--dry-run")
    direct, passed = (get_parser().parse_args(argv) for argv in (words, made.tasks[0].argv))
    assert vars(passed) == vars(direct)
    assert passed.given == direct.given
    unchanged = [a.dest for a in actions if getattr(direct, a.dest) == a.default]
    assert unchanged == [], "the sample shows nothing"


TINY = "--local --model d2_deit_tiny_patch16_LS --input-size 32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--array model=deit_tiny_patch16_LS,nosuch", "unknown model 'nosuch'"),
        ("--opt nosuch", "unknown optimizer 'nosuch'"),
        ("--aa nosuch", "augmentation 'nosuch' is not understood"),
        ("--input-size 33", "33"),
        ("--model-kwargs nosuch=1", "no argument 'nosuch'"),
        ("--device cuda", "no CUDA device is available"),
        ("--data-path /nowhere", "the data path does not exist"),
        ("--data-path {tmp}/data --batch-size 4", "other"),
        ("--resume nosuch.pth", "--resume nosuch.pth: there is no such file"),
        ("--finetune nosuch.pth", "--finetune nosuch.pth: there is no such file"),
        ("--distillation-type hard --teacher-model nosuch", "unknown teacher 'nosuch'"),
        ("--distillation-type hard --teacher-path nosuch.pth", "--teacher-path nosuch.pth: there"),
        ("--batch-size 2000 --ngpus 3", "fewer than one global batch of 6000"),
        ("--nb-classes 3", "--nb-classes 3 is too few"),
        ("--job-dir {tmp}/file/%j", "the job's folder .* cannot be made: .*file is not"),
        ("--output-dir {tmp}/file", "the job's folder .* cannot be made: .*file is not"),
        ("--wandb", "pip install wandb"),
        ("--output-dir {tmp} --overwrite", "--overwrite would remove the job's own state"),
    ],
)
def test_what_would_fail_is_refused_before_a_job_starts(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(submit_module, "_local_executor", lambda _: pytest.fail("a job started"))
    (tmp_path / "file").touch()
    make_images(tmp_path / "data", 8, 8)
    (tmp_path / "data/val/class0").rename(tmp_path / "data/val/other")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        submit_module.submit(spec(*f"{TINY} {words}".format(tmp=tmp_path).split()))
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_what_may_be_right_passes_before_a_job_starts(tmp_path, capsys):
    words = ["--model", "d2_deit_tiny_patch16_LS", "--data-path", "/nowhere"]
    check(spec(*words, "--job-dir", str(tmp_path / "%j")))
    note = "note    /nowhere is not on this machine: the nodes must see it\n"
    assert capsys.readouterr().out == note
    with pytest.raises(UserError, match="augmentation 'nosuch' is not understood"):
        check(spec(*words, "--aa", "nosuch"))
    capsys.readouterr()
    # what a checkpoint says, and a teacher that nobody asks
    (tmp_path / "a.pth").touch()
    own = f"--finetune {tmp_path}/a.pth --nb-classes 3 --model-kwargs nosuch=1"
    for words in ("", own, "--teacher-path nosuch.pth", "--resume runs/%j/a.pth"):
        check(spec(*f"{TINY} {words}".split()))
    assert capsys.readouterr().out == ""
