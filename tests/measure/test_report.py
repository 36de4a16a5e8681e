"""What users get: tables, JSON, CSV, the figure, and the command line."""

import csv
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deit.errors import UserError
from deit.measure import command, options
from deit.measure.command import default_names, main
from deit.measure.measure import Result
from deit.measure.options import parse_args
from deit.measure.plot import draw, make_figure
from deit.measure.roofline import PeakRates
from deit.measure.tables import COLUMNS, as_csv, as_json, print_comparisons, print_table
from deit.models.published import PUBLISHED
from deit.train.args import parse_args as training_options

ROOT = Path(__file__).parents[2]
TWIN, OURS = "deit_base_patch16_LS", "d2_deit_base_patch16_LS"
TINY = "d2_deit_tiny_patch16_LS"
LONGEST = "d2_inv_early_deit_huge_patch14_52_LS"
RATIOS = {"gflops", "images_per_s", "train_images_per_s", "peak_memory_mb"}
FIELDS = RATIOS | {"model", "params", "twin", "ratios"}


def results():
    more = dict(batch_size=64, spread=0.01, train_spread=0.02, train_peak_memory_mb=4000.0,
                bound_images_per_s=2000.0, bound_by_arithmetic=0.9,
                train_bound_images_per_s=700.0, notes=["a note"])  # fmt: skip
    return {
        TWIN: Result(TWIN, 86_585_320, 17.68, 1000.0, 300.0, 900.0, None, **more),
        OURS: Result(OURS, 43_311_976, 9.33, 1100.0, 330.0, 600.0, TWIN, **more),
    }


def test_json_and_csv_have_exactly_the_documented_fields():
    rows = results() | {TINY: Result(TINY, 1, None, twin="deit_tiny_patch16_LS")}
    report = json.loads(as_json(rows, {"device": "cpu"}))
    assert set(report) == {"settings", "results"}
    assert report["settings"]["device"] == "cpu"
    details = report["settings"]["details"][OURS]
    assert (details["notes"], details["spread"]) == (["a note"], 0.01)
    twin, ours, absent = report["results"]
    assert set(twin) == set(ours) == FIELDS
    assert set(ours["ratios"]) == RATIOS
    assert (twin["twin"], ours["twin"]) == (None, TWIN)
    assert twin["ratios"] == absent["ratios"] == dict.fromkeys(RATIOS)
    assert ours["ratios"]["images_per_s"] == pytest.approx(1.1)
    assert ours["ratios"]["peak_memory_mb"] == pytest.approx(2 / 3)
    assert absent["gflops"] is absent["images_per_s"] is None
    _, line, absent = csv.DictReader(io.StringIO(as_csv(rows)))
    ratios = {f"{name}_ratio" for name in RATIOS}
    assert line.keys() == (FIELDS - {"ratios"}) | ratios | details.keys()
    assert (line["model"], line["notes"]) == (OURS, "a note")
    assert float(line["images_per_s_ratio"]) == pytest.approx(1.1)
    assert float(line["bound_images_per_s"]) == 2000
    assert absent["gflops"] == absent["images_per_s_ratio"] == ""


def test_tables_fit_into_a_narrow_terminal():
    rows = results()
    rows[LONGEST] = Result(LONGEST, 769_411_560, 207.23, 12.3, peak_memory_mb=9e4, spread=0.01)
    for row in rows.values():
        row.train_images_per_s = None
    console = Console(file=(output := io.StringIO()), width=80)
    print_table(rows.values(), rows, list(COLUMNS.values())[:4], console)
    print_comparisons(rows, console)
    text = output.getvalue()
    assert LONGEST in text
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    ours = [line.split() for line in text.splitlines() if line.startswith(OURS)]
    assert ours[0][1:] == ["43.3", "1,100", "±1.0%", "9.33", "600"]
    assert ours[1][1:] == ["-47%", "+10%", "-33%", "+6%"]  # the last is published
    assert ours[2][1:] == ["2,000", "55%", "arithmetic"]
    assert f"{OURS}: a note" in text


def test_figure_draws_the_data():
    def lines(axes):
        return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}

    gains, accuracies = make_figure(results(), "a device").axes
    drawn = lines(gains)
    assert drawn["ViT, equivariant"] == [[9.33, pytest.approx(10)]]
    assert drawn["ViT, equivariant, published (A100)"] == [[9.33, pytest.approx(6)]]
    assert "a device" in gains.get_title()
    drawn = lines(accuracies)
    assert drawn == {"ViT, ordinary": [[17.68, 83.1]], "ViT, equivariant": [[9.33, 82.2]]}

    # of all published networks, without measurements: a line a family, and the zero
    rows = {row.name: Result(row.name, 1, 10.0 + i) for i, row in enumerate(PUBLISHED)}
    gains, accuracies = make_figure(rows).axes
    assert len(gains.get_lines()) == 3 + 1
    points = sum(len(line.get_xdata()) for line in accuracies.get_lines())
    assert points == sum(row.top1 is not None for row in PUBLISHED)


@pytest.mark.parametrize("gflops", [0.03, 207.0])
def test_axes_are_around_the_networks_and_an_empty_panel_says_why(gflops):
    gains, accuracies = make_figure({TINY: Result(TINY, 1, gflops)}).axes
    for axes, absent in ((gains, "timed"), (accuracies, "accuracy")):
        low, high = axes.get_xlim()
        assert low < gflops < high < 3 * low
        assert any(low <= tick <= high for tick in axes.get_xticks())
        assert absent in axes.texts[0].get_text()


def test_figure_files(tmp_path):
    draw(results(), tmp_path / "figure.png", "")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no FLOPs"):
        draw({TWIN: Result(TWIN, 1, None)}, tmp_path / "other.png", "")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--amp --dtype float32", "--amp with --dtype float32"),
        ("--train --no-throughput", "--train measures times"),
        ("--profile --no-throughput", "--profile measures times"),
        ("--fold --no-throughput", "--fold measures times"),
        ("--fold --train", "is not trained"),
        ("--batch-size 0", "at least 1"),
        *((f"{option} nowhere/x.png", "no folder") for option in ("--json", "--csv", "--plot")),
        ("--plot figure.xyz", r"figure\.xyz.*\.png"),
        ("--compile-mode fastest", "fastest"),
        ("--dtype int8", "int8"),
        ("--device foo", "'foo' is not one of auto, cpu, cuda"),
        ("--json x --csv ./x", "--json, --csv and --plot are one file"),
        ("--checkpoint x --models d2_deit_*", "one network, not .*exact name"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_args(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "dtype", "storage"),
    [
        ("", torch.float32, torch.float32),
        ("--amp", torch.bfloat16, torch.float32),
        ("--amp --dtype float16", torch.float16, torch.float32),
        ("--dtype bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(arguments, dtype, storage):
    args = parse_args(["--device", "cpu", *arguments.split()])
    assert (args.dtype, args.storage) == (dtype, storage)


class Interrupted(Exception):
    pass


def test_arithmetic_is_that_of_training(monkeypatch):
    """TF32, the choice of convolutions, and threads, by one function with one set of defaults."""

    def settled(options, device):
        assert (vars(options), device) == (vars(expected), torch.device("cuda"))
        raise Interrupted

    expected = training_options([])
    expected.threads = 3
    monkeypatch.setattr(options, "choose_device", torch.device)
    monkeypatch.setattr(command, "set_precision", settled)
    with pytest.raises(Interrupted):
        main(["--device", "cuda", "--dtype", "float32", "--threads", "3"])


def test_counting_command(tmp_path, capsys):
    words = f"--models {TINY} --no-throughput --compile-mode reduce-overhead --device cpu"
    words += f" --json {tmp_path}/out.json --csv {tmp_path}/out.csv --plot {tmp_path}/out.svg"
    assert main(words.split()) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["model"] for row in report["results"]] == [TINY.removeprefix("d2_"), TINY]
    assert report["results"][1]["gflops"] == pytest.approx(0.7675, rel=1e-3)
    assert report["results"][1]["images_per_s"] is report["settings"]["ceilings"] is None
    assert report["settings"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["settings"]["compile_mode"] == "reduce-overhead"  # which implies --compile
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
    assert (tmp_path / "out.svg").read_bytes().startswith(b"<?xml")
    captured = capsys.readouterr()
    assert "-40%" in captured.out
    assert f"{TINY}: counting" in captured.err


def test_defaults_on_a_cpu_are_small():
    args, counted = (parse_args(["--device", "cpu", *more]) for more in ([], ["--no-throughput"]))
    small = [row for row in PUBLISHED if row.name in default_names(args)]
    args.device = torch.device("cuda")
    assert len(default_names(args)) == len(default_names(counted)) == 26
    assert [row.size for row in small] == 3 * ["S"] + 2 * ["S"] + 2 * ["T12"] + 2 * ["S24"]


def test_measuring_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_peak_rates", lambda *_: PeakRates(1e11, 1e10))
    path = tmp_path / "out.json"
    words = f"--models {TINY} --img-size 32 --batch-size 2 --min-time 0 --fold --device cpu"
    words += f" --profile --model-kwargs depth=1 --json {path}"
    assert main(words.split()) == 0
    report = json.loads(path.read_text())
    twin, ours, folded = report["results"]
    for row in (ours, folded):
        assert row["ratios"]["images_per_s"] == row["images_per_s"] / twin["images_per_s"]
    assert ours["peak_memory_mb"] < twin["peak_memory_mb"]
    assert folded["model"] == f"{TINY}, folded"
    assert folded["gflops"] is ours["train_images_per_s"] is None
    assert report["settings"]["arguments"] == {"depth": 1}
    assert report["settings"]["ceilings"] == {"tflop_per_s": 0.1, "gb_per_s": 10.0}
    assert report["settings"]["details"][TINY]["bound_images_per_s"] > 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert "network params throughput FLOPs memory\n" in printed
    for text in ("layer: FoldedVisionTransformer", "Roofline", "by layer, eager", "0.10 TFLOP/s",
                 "plan 3 networks in 1 group, about"):  # fmt: skip
        assert text in printed


def test_what_is_measured_survives_an_interruption(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    measured = []

    def measure(members, *_):
        if measured:
            raise Interrupted
        measured.append(members)
        for result in members:
            result.images_per_s = 7.0

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "measure_peak_rates", lambda *_: PeakRates(1e9, 1e9))
    words = f"--models deit_tiny_patch16_LS resmlp_12 --img-size 32 --device cpu --json {path}"
    with pytest.raises(Interrupted):
        main(words.split())
    first, second = json.loads(path.read_text())["results"]
    assert (first["images_per_s"], second["images_per_s"]) == (7.0, None)


def test_script_from_another_folder(tmp_path, monkeypatch, capsys):
    script = str(ROOT / "calculate_complexity.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", [script, "--models", "d2_deit_giant", "--no-throughput"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert sys.path[0] == str(ROOT)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --models d2_deit_giant: ")
    assert error.count("\n") == 1
