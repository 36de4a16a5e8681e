"""The benchmark of folded networks, on the smallest ones."""

import json

import pytest
import torch

from benchmarks import deploy
from deit.errors import UserError

NAME = "d2_deit_tiny_patch16_LS"


def test_measures_and_adds_to_what_is_known(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"other": {}}))
    words = f"--models {NAME} --runtimes eager --batch-size 1 --min-time 0 --threads 1"
    assert deploy.main([*words.split(), "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert list(results) == ["other", NAME]
    seconds = results[NAME]["eager"]["seconds"]
    assert set(seconds) == {"twin", "unfolded", "folded"}
    expected = f"{seconds['twin'] / seconds['folded']:.2f}"
    assert f"| `{NAME}` |  | {expected} |" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no ordinary twin"):
        deploy.main(["--models", "deit_tiny_patch16_LS"])
