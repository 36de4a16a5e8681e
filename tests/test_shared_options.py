"""What the command lines share: checked output files, the options of torch.compile."""

import errno
import re
import tempfile
from argparse import ArgumentTypeError
from unittest.mock import Mock

import pytest

from deit import cli
from deit.cli import CommandLine, OptionGroup, duration, number, output_file
from deit.errors import UserError


@pytest.fixture
def parser():
    parser = CommandLine(prog="test")
    group = OptionGroup(parser, "options")
    cli.add_compile(group, "compile")
    group.add("--plot", output_file(".png", ".svg"), None, "FILE", "a figure")
    return parser


def test_a_mode_turns_compilation_on(parser):
    for arguments, compiled in {
        "": False,
        "--compile": True,
        "--compile-mode max-autotune": True,
        "--compile_mode max-autotune --no-compile": False,
        "--compile-blocks": True,
        "--compile-blocks --compile-mode max-autotune-no-cudagraphs": True,
        "--no-compile-blocks": False,
        "--compile --no-compile-blocks": True,
        "--compile-blocks --no-compile --compile-mode=default --no-compile": False,
    }.items():
        args = parser.parse_args(arguments.split())
        assert args.compile is compiled
        assert [args.compile_mode] == (re.findall(r"mode.(\S+)", arguments) or ["default"])
        assert args.compile_blocks == (" --compile-blocks" in f" {arguments}")


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_cuda_graphs_hold_a_whole_network(parser, mode):
    with pytest.raises(UserError, match=f"--compile-blocks with --compile-mode {mode}: .*default"):
        parser.parse_args(["--compile-blocks", "--compile-mode", mode])
    assert not parser.parse_args(
        ["--compile-blocks", "--compile-mode", mode, "--no-compile"]
    ).compile


def test_an_output_that_can_be_written(parser, tmp_path):
    path = tmp_path / "figure.PNG"
    path.write_text("an earlier one")
    assert parser.parse_args(["--plot", str(path)]).plot == path
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("figure.xyz", r"figure\.xyz.*\.png, \.svg"),
        ("figure", r"\.png, \.svg"),
        ("nowhere/figure.png", "no folder"),
        ("folder.png", "is a folder"),
        ("file/figure.png", "no folder"),
    ],
)
def test_outputs_that_cannot_be_written(parser, tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--plot: .*{message}"):
        parser.parse_args(["--plot", str(tmp_path / name)])


def test_a_folder_that_is_read_only(parser, monkeypatch, tmp_path):
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=read_only))
    with pytest.raises(UserError, match="Read-only file system"):
        parser.parse_args(["--plot", str(tmp_path / "out.svg")])


def test_the_option_of_earlier_versions_is_noted_once(capsys, monkeypatch):
    monkeypatch.delenv("DEIT_KERNELS", raising=False)
    cli._note_kernels.cache_clear()
    parser = CommandLine(prog="test")
    cli.add_kernels(OptionGroup(parser, "options"))
    parser.parse_args(["--kernels", "plain"])
    assert capsys.readouterr().err.startswith("note    --kernels has no effect")
    parser.parse_args([])
    parser.parse_args(["--kernels", "plain"])
    assert not capsys.readouterr().err
    cli._note_kernels.cache_clear()
    monkeypatch.setenv("DEIT_KERNELS", "auto")
    parser.parse_args([])
    assert capsys.readouterr().err.startswith("note    DEIT_KERNELS has no effect")


@pytest.mark.parametrize(
    ("bounds", "wrong", "words"),
    [
        ({"low": 1}, "0", "at least 1"),
        ({"above": 0}, "0", "above 0"),
        ({"low": 0, "high": 1}, "1.5", "at least 0 and at most 1"),
        ({"above": 0, "high": 1}, "0", "above 0 and at most 1"),
    ],
)
def test_numbers_out_of_range(bounds, wrong, words):
    with pytest.raises(ArgumentTypeError, match=f"{wrong} is out of range, it must be {words}$"):
        number(float, **bounds)(wrong)
    assert number(float, **bounds)("1") == 1


def test_durations():
    texts = ["0s", "1min", "3h 5min", "2d 1h"]
    assert [duration(s) for s in (0, 59.6, 3 * 3600 + 300, 2 * 86400 + 3600 + 5)] == texts
