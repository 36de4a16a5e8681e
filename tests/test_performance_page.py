"""The tables of docs/performance.md are those of the committed result files."""

import json

import pytest

from benchmarks import cpu_report, performance_page


@pytest.mark.parametrize("table", ["inference_table", "variants_table"])
def test_tables_come_from_the_result_files(table):
    page = performance_page.PAGE.read_text(encoding="utf-8")
    rows = getattr(performance_page, table)()
    assert rows.count("\n") > 5
    assert rows in page


def test_every_result_names_its_conditions():
    files = sorted(performance_page.RESULTS.glob("*.json"))
    assert files
    for path in files:
        report = json.loads(path.read_text(encoding="utf-8"))
        settings = report.get("settings", report) | {"device": report.get("device")}
        assert settings["threads"] == 2
        assert settings["versions"]["torch"]


def test_the_figure_is_drawn():
    figure = performance_page.draw()
    assert [len(axes.lines) > 1 for axes in figure.axes] == [True] * 3


def test_cpu_report(tmp_path, capsys):
    output = tmp_path / "report.json"
    name = "d2_deit_tiny_patch16_LS"
    arguments = ["--models", name, "--batch-size", "1", "--min-time", "0", "--threads", "1"]
    assert cpu_report.main([*arguments, "--json", str(output)]) == 0
    seconds = json.loads(output.read_text())["seconds"][name]
    assert list(seconds) == list(cpu_report.VARIANTS)
    assert all(value > 0 for value in seconds.values())
    assert name in capsys.readouterr().out
