"""What the command lines share: one-line errors, output files, the options of torch.compile."""

import errno
import os
import re
import tempfile
from unittest.mock import Mock

import pytest
from rich.console import Console

from deit import cli
from deit.cli import CommandLine, OptionGroup, duration, output_file
from deit.errors import EXIT_USER_ERROR, UserError, one_line_errors, run_command, suggest


@pytest.fixture
def parse():
    parser = CommandLine(prog="test")
    group = OptionGroup(parser, "options")
    cli.add_compile(group, "compile")
    cli.add_kernels(group)
    group.add("--plot", output_file(".png", ".svg"), None, "FILE", "a figure")
    return lambda words: parser.parse_args(words.split())


def test_a_mode_turns_compilation_on(parse):
    for words, compiled in {
        "": False,
        "--compile": True,
        "--compile-mode max-autotune": True,
        "--compile_mode max-autotune --no-compile": False,
        "--compile-blocks": True,
        "--compile-blocks --compile-mode max-autotune-no-cudagraphs": True,
        "--compile-blocks --compile-mode reduce-overhead --no-compile": False,
        "--no-compile-blocks": False,
        "--compile --no-compile-blocks": True,
        "--compile-blocks --no-compile --compile-mode=default --no-compile": False,
    }.items():
        args = parse(words)
        assert args.compile is compiled
        assert [args.compile_mode] == (re.findall(r"mode.(\S+)", words) or ["default"])
        assert args.compile_blocks == (" --compile-blocks" in f" {words}")


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_cuda_graphs_hold_a_whole_network(parse, mode):
    with pytest.raises(UserError, match=f"--compile-blocks with --compile-mode {mode}: .*default"):
        parse(f"--compile-blocks --compile-mode {mode}")


def test_an_output_that_can_be_written(parse, tmp_path):
    path = tmp_path / "figure.PNG"
    path.write_text("an earlier one")
    assert parse(f"--plot {path}").plot == path
    assert parse(f"--plot {tmp_path / 'new.svg'}").plot == tmp_path / "new.svg"
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "link").symlink_to(path.name)
    assert parse(f"--plot {tmp_path / 'link'}").plot == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("figure.xyz", r"figure\.xyz.*\.png, \.svg"),
        ("figure", r"\.png, \.svg"),
        ("nowhere/figure.png", "no folder"),
        ("folder.png", "is a folder or a device"),
        ("pipe.png", "is a folder or a device"),
        ("file/figure.png", "no folder"),
        ("out.svg", "Read-only file system"),
    ],
)
def test_outputs_that_cannot_be_written(parse, tmp_path, monkeypatch, name, message):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "file").touch()
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=read_only))
    with pytest.raises(UserError, match=f"--plot: .*{message}"):
        parse(f"--plot {tmp_path / name}")


def test_the_option_of_earlier_versions_is_noted_once(parse, capsys, monkeypatch):
    monkeypatch.delenv("DEIT_KERNELS", raising=False)
    cli._note_kernels.cache_clear()
    for words, noted in {"--kernels plain": True, "": False, " --kernels plain": False}.items():
        parse(words)
        assert capsys.readouterr().err.startswith("note    --kernels has no effect") == noted
    cli._note_kernels.cache_clear()
    monkeypatch.setenv("DEIT_KERNELS", "auto")
    parse("")
    assert capsys.readouterr().err.startswith("note    DEIT_KERNELS has no effect")


def test_durations():
    texts = ["0s", "1min", "3h 5min", "2d 1h"]
    assert [duration(s) for s in (0, 59.6, 3 * 3600 + 300, 2 * 86400 + 3600 + 5)] == texts


def test_user_errors_are_one_line_and_defects_keep_their_traceback(capsys):
    def fail(error):
        raise error

    mistake = UserError("no folder 'x'\n  give --data-path")
    assert one_line_errors(lambda: fail(mistake)) == EXIT_USER_ERROR == 2
    assert capsys.readouterr() == ("", "error: no folder 'x' give --data-path\n")
    assert [one_line_errors(lambda: None), one_line_errors(lambda: 3)] == [0, 3]
    with pytest.raises(ValueError, match="a defect"):
        one_line_errors(lambda: fail(ValueError("a defect")))


@pytest.mark.parametrize(("say", "status"), [(print, 3), (Console().print, 0)])
def test_readers_may_stop_reading(say, status, monkeypatch, capfd):
    """As `head` does; a pipe of another kind that breaks is a defect."""
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(BrokenPipeError):
            run_command(Mock(side_effect=BrokenPipeError))
        os.close(reading)
        assert run_command(lambda: say("something") or 3) == status
    assert capfd.readouterr() == ("", "")


def test_suggestions():
    known = ["d2_deit_small_patch16_LS", "d2_deit_base_patch16_LS", "resmlp_12"]
    near = "; did you mean d2_deit_small_patch16_LS or d2_deit_base_patch16_LS?"
    assert suggest("d2_deit_smal_patch16", known) == near
    assert suggest("resmlp_1", known) == "; did you mean resmlp_12?"
    assert suggest("zzz", known) == ""
