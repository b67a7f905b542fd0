"""Where things are kept."""

from fromage.places import cache_folder


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FROMAGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fromage"
    monkeypatch.setenv("FROMAGE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
