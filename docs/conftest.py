"""The code of the guide is tested in a folder of its own, in which it may write."""

import pytest


@pytest.fixture(autouse=True)
def _in_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
