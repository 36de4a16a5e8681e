"""The table of docs/performance.md is that of the committed result files."""

from benchmarks import performance_page


def test_the_table_comes_from_the_result_files():
    page = performance_page.PAGE.read_text(encoding="utf-8")
    assert performance_page.table().count("\n") > 5
    assert performance_page.table() in page
    assert performance_page.conditions() in page


def test_every_result_names_its_conditions():
    settings = [settings for settings, _ in performance_page.results()]
    assert settings
    for each in settings:
        assert each["threads"] == 2
        assert each["versions"]["torch"]


def test_the_figure_has_a_bar_for_each_network_and_mode():
    figure = performance_page.draw()
    bars = sum(len(axes.patches) for axes in figure.axes)
    found = performance_page.ratios().values()
    assert bars == sum(mode in own for own in found for mode in performance_page.MODES)
