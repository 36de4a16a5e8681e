"""The tables of docs/performance.md and of the README are those of the committed result files."""

import json

from benchmarks import performance_page


def test_the_table_comes_from_the_result_files():
    page = performance_page.PAGE.read_text(encoding="utf-8")
    assert performance_page.table().count("\n") > 5
    assert performance_page.table() in page
    assert performance_page.conditions() in page
    known = json.loads((performance_page.RESULTS / "deploy.json").read_text(encoding="utf-8"))
    assert performance_page.deploy_table(known) in page
    assert performance_page.deploy_conditions(known) in page
    assert performance_page.short_table(known) in performance_page.README.read_text(
        encoding="utf-8"
    )


def test_every_result_names_its_conditions():
    settings = [settings for settings, _ in performance_page.results()]
    assert settings
    for each in settings:
        assert each["threads"] == 2
        assert each["versions"]["torch"]


def test_the_figure_has_a_bar_for_each_network_and_mode():
    found, modes = performance_page.ratios(), performance_page.MODES
    figure = performance_page.bars(found, modes, performance_page.conditions(), flops=True)
    bars = sorted(bar.get_width() for axes in figure.axes for bar in axes.patches)
    assert bars == sorted(own[mode] for mode in modes for own in found.values() if mode in own)
