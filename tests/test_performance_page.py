"""Tables and figures of docs/performance.md and of the README are those of the result files."""

import json

from benchmarks import performance_page as page


def test_pages_and_figures_come_from_the_result_files(tmp_path, monkeypatch):
    committed = {"PAGE": page.PAGE.read_bytes(), "README": page.README.read_bytes()}
    monkeypatch.setattr(page, "ASSETS", tmp_path)
    for name, content in committed.items():
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(page, name, tmp_path / name)
    assert page.main([]) == 0
    for name, content in committed.items():
        assert (tmp_path / name).read_bytes() == content
        assert b"| `d2_deit_base_patch16_LS` |" in content
    for name in ("throughput.png", "deploy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_result_names_its_conditions():
    files = list(page.RESULTS.glob("cpu_*.json"))
    assert files
    for file in files:
        settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
        assert settings["threads"] == 2
        assert settings["versions"]["torch"]


def test_the_figure_has_a_bar_for_each_network_and_mode():
    conditions, found = page.ratios()
    figure = page.bars(found, page.MODES, conditions, flops=True)
    bars = sorted(bar.get_width() for axes in figure.axes for bar in axes.patches)
    assert bars == sorted(own[mode] for mode in page.MODES for own in found.values() if mode in own)
