from __future__ import annotations

import pytest

from gkd.errors import UserError
from gkd.sources import RECIPES, find_source


def test_recipes_are_found_by_their_names_and_a_file_of_the_users_wins(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert repository / "gin" == RECIPES
    name = "gin/methods/kd.gin"
    assert find_source(name, "a test") == RECIPES / "methods" / "kd.gin"
    (tmp_path / "gin" / "methods").mkdir(parents=True)
    (tmp_path / name).write_text("")
    assert find_source(name, "a test") == tmp_path / name


def test_an_absent_file_names_the_places_and_near_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"gin/methods/dkkd.gin, asked for by a test .*Did you mean gin/methods/dkd.gin"):
        find_source("gin/methods/dkkd.gin", "a test")
    (tmp_path / "run.gin").write_text("")
    with pytest.raises(UserError, match=r"Did you mean runn?.gin\?"):
        find_source("runn.gin", "a test")
