import multiprocessing

from fromage.retrieval import trust


def draw(queue):
    queue.put(trust.secret())


def test_the_secret_is_drawn_once_and_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    drawing = [context.Process(target=draw, args=(queue,)) for _ in range(8)]
    for each in drawing:
        each.start()
    assert len({queue.get(timeout=30) for _ in drawing}) == 1
    path = tmp_path / "state" / "fromage" / "secret"
    assert path.stat().st_mode & 0o777 == 0o600 and [each.name for each in path.parent.iterdir()] == ["secret"]
    assert trust.derived("a") == trust.derived("a") != trust.derived("b")
    path.chmod(0o644)
    assert trust.secret() is None, "others can read it"


def test_a_seal_holds_for_what_was_sealed_and_on_this_machine_alone(tmp_path, monkeypatch):
    about = trust.sealed({"count": 3, "root": "/photos"})
    assert trust.is_sealed(about) and trust.is_sealed(trust.sealed(about))
    assert not trust.is_sealed(about | {"root": "/home"}) and not trust.is_sealed({"count": 3, "root": "/photos"})
    assert not any(trust.is_sealed(about | {trust.SEAL: odd}) for odd in (None, 1, "", "é", "0" * 64))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert not trust.is_sealed(about)


def test_where_no_secret_can_be_kept_nothing_is_sealed_or_believed(tmp_path, monkeypatch):
    about = trust.sealed({"count": 3})
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert trust.sealed({"count": 3}) == {"count": 3} and not trust.is_sealed(about)
    assert not trust.is_sealed({"count": 3, trust.SEAL: ""}) and trust.derived("a") != trust.derived("a")
