"""The command line as a user meets it: what works, and what bad input gets."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fromage.apps.terminal import talk
from fromage.cli.command import options_of, parser_of
from fromage.cli.main import COMMANDS, main
from fromage.cli.options import FILES, in_image
from fromage.errors import UserError
from fromage.generation.chat import Chat
from fromage.printable import MARK
from fromage.training.configs import config_folder, find_config
from fromage.training.fit import run_lightning

CONFIGS = sorted(p.name for p in config_folder().glob("*.yaml"))


def test_configurations_are_found_as_given_else_in_lightning_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("cc3m.yaml")) == config_folder() / "cc3m.yaml" == Path(find_config("cc3m"))
    (tmp_path / "cc3m.yaml").write_text("trainer: {}")
    assert find_config("cc3m.yaml") == "cc3m.yaml"
    with pytest.raises(UserError, match=r"nobody.yaml.*cc3m.yaml"):
        find_config("nobody.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_parses(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", name, "--print_config"])
    assert stop.value.code == 0 and "class_path: fromage" in capsys.readouterr().out


@pytest.fixture(scope="module")
def fast(world, tmp_path_factory):
    """Options for a run of two steps on the small world."""
    out = tmp_path_factory.mktemp("cli")
    return [
        "--config=toy.yaml",
        "--overwrite",
        f"--data.train_shards={world}/cc3m/train",
        f"--data.val_shards={world}/cc3m/val",
        "--data.batch_size=16",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.save_dir={out}",
        f"--trainer.callbacks.init_args.dirpath={out}/checkpoints",
        "--trainer.callbacks.init_args.every_n_train_steps=2",
        "--trainer.enable_progress_bar=false",
    ]


@pytest.fixture(scope="module")
def checkpoint(fast):
    assert main(["fit", *fast]) == 0
    return Path(fast[-3].partition("=")[2]) / "last.ckpt"


def test_fit_index_search_end_to_end(checkpoint, world, tmp_path, capsys):
    coco = world / "coco"
    captions = ["--captions", str(coco / "annotations" / "captions_val2017.json")]
    built = [
        "index",
        "build",
        "--ckpt",
        str(checkpoint),
        "--images",
        str(coco / "val2017"),
        "--out",
        str(tmp_path / "index"),
    ]
    assert main([*built, *captions]) == 0
    png = tmp_path / "found.png"
    words = ["a small red star at night", "a blue ring"]
    assert main(["search", *words, "--index", str(tmp_path / "index"), "--png", str(png), "-k", "3"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words) and out.count("val2017") == 6 and png.stat().st_size > 1000


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_lightnings_other_verbs_take_a_checkpoint(verb, checkpoint, fast, capsys):
    assert main([verb, *fast, "--ckpt_path", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert {"validate": "val/t2i_r1", "test": "test/t2i_r1", "predict": "60 predictions -> "}[verb] in out
    if verb == "predict":
        table = pq.read_table(re.search("predictions -> (.*)", out)[1])
        assert table.column_names == ["keys", "captions", "images", "texts"] and len(set(table["keys"].to_pylist())) == 60
        assert all(len(row) == 256 for row in table["images"].to_pylist() + table["texts"].to_pylist())


def on_terminal(words):
    """What a terminal gets of a command, in a process of its own."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (30, 120))
    running = subprocess.Popen([sys.executable, "-m", "fromage.cli.main", *words], stdin=its, stdout=its, stderr=its)
    os.close(its)
    got = b""
    with suppress(OSError):  # it has ended
        while data := os.read(ours, 4096):
            got += data
    os.close(ours)
    assert running.wait() == 0, got.decode()
    return got.decode()


def test_a_progress_bar_is_drawn_on_a_terminal_and_written_to_a_file(fast, capsys):
    barred = [*fast[:-1], "--trainer.max_steps=4"]
    shown = on_terminal(["fit", *barred])
    assert re.search(r"\rEpoch 0: .*█+.* 4/4 .*step=4/4, left=00:00, loss=", shown)
    assert MARK not in shown, "what a bar draws passes"
    capsys.readouterr()
    assert main(["fit", *barred, "--trainer.log_every_n_steps=2"]) == 0
    said = capsys.readouterr().out
    assert "2/4" in said and "4/4" in said and "3/4" not in said, "in steps that are logged"


def test_predictions_are_not_replaced_without_a_word(fast, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    again = ["predict", *(word for word in fast if word != "--overwrite"), "--trainer.logger=false"]
    (tmp_path / "predictions.parquet").touch()
    assert main(again) == 2 and "predictions.parquet: is there already" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0 and "no --ckpt_path is given" in capsys.readouterr().err
    assert pq.read_table(tmp_path / "predictions.parquet").num_rows == 60


def bad(*words):
    """A command line that a user got wrong, in a process of its own: (exit code, stderr)."""
    done = subprocess.run([sys.executable, "-m", "fromage.cli.main", *words], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def message(stderr):
    return [line for line in stderr.strip().splitlines() if line.startswith("fromage: ")]


def test_bad_input_gets_one_line_and_a_code(fast, checkpoint, tmp_path, capsys):
    torn = tmp_path / "torn.yaml"
    torn.write_text("trainer: [unclosed")
    notes = tmp_path / "notes.txt"
    notes.write_text("no checkpoint")
    cases = [
        (["fit", *fast, "--data.train_shards=/no/such/shards"], "/no/such/shards"),
        (["fit", "--config", "nobody.yaml"], "nobody.yaml"),
        (["fit", "--config", str(torn)], "torn.yaml"),
        (["fit", *fast, "--model.kk=3"], "kk"),
        (["fit", *fast, "--model.lm=/no/such/model"], "/no/such/model"),
        (["fit", *fast, "--model.vision=ViT-Q-99"], "ViT-Q-99"),
        (["fit", *fast, "--model.k=3", f"--ckpt_path={checkpoint}"], "visual_prefix.weight"),
        (["fit", *fast, f"--ckpt_path={notes}"], "notes.txt"),
        (["fit", *fast, f"--ckpt_path={tmp_path}/none.ckpt"], "none.ckpt"),
        (["search", "a star", "--index", str(tmp_path / "none")], "none"),
        (["index", "build", "--ckpt", str(notes), "--images", str(tmp_path), "--out", str(tmp_path / "i")], "holds neither"),
        (["export", "--ckpt", str(notes), "--out", str(tmp_path / "i")], "notes.txt"),
    ]
    for number, (words, named) in enumerate(cases):
        capsys.readouterr()
        code, stderr = bad(*words) if number in (0, len(cases) - 1) else (main(words), capsys.readouterr().err)
        assert code == 2 and "Traceback" not in stderr, (words, stderr)
        assert len(message(stderr)) == 1 and named in message(stderr)[0], (words, stderr)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("trainer: {max_step: 3}", "trainer.max_step: there is no such option; did you mean --trainer.max_steps?"),
        ("modell: {class_path: fromage.FromageModule}", "did you mean --model?"),
        ("model: {class_path: fromage.FromageModul}", "did you mean fromage.FromageModule?"),
        ("model: {class_path: fromage.FromageModule, init_args: {kk: 3}}", "did you mean --model.k?"),
        ("data: {class_path: fromage.CC3M, init_args: {train_shard: x}}", "did you mean --data.train_shards?"),
    ],
)
def test_a_wrong_key_of_a_configuration_is_asked_about(wrong, meant, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(wrong)
    assert main(["fit", "--config", str(tmp_path / "a.yaml")]) == 2
    assert meant in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_what_a_module_refuses_is_one_line_too(capsys):
    assert main(["fit", "--config", "toy.yaml", "--model.chunk", "-1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("fromage: model.chunk -1: choose")


def test_debug_shows_the_traceback():
    code, stderr = bad("--debug", "fit", "--config", "nobody.yaml")
    assert code == 1 and "Traceback" in stderr


@pytest.fixture
def ctrl_c():
    """Ctrl-C does here what it does at a terminal, also under a runner that was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopped(number):
    return lambda: signal.raise_signal(number)


def test_ctrl_c_and_sigterm_are_one_line_and_a_code_of_their_own(monkeypatch, capsys, ctrl_c):
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setitem(COMMANDS, "plan", stopped(number))
        assert main(["plan"]) == 130
        assert capsys.readouterr().err == "fromage: stopped\n"


def test_a_conversation_is_over_at_the_first_sigterm(monkeypatch, capsys, ctrl_c, toy_model):
    lines = iter([lambda: signal.raise_signal(signal.SIGINT), lambda: signal.raise_signal(signal.SIGTERM), lambda: "late"])
    monkeypatch.setitem(COMMANDS, "plan", lambda: talk(Chat(toy_model), lambda prompt: next(lines)()))
    assert main(["plan"]) == 130 and next(lines)() == "late"
    out = capsys.readouterr()
    assert out.out.count("(stopped; the turn is forgotten)") == 1 and out.err.endswith("fromage: stopped\n")


def test_a_file_that_is_there_is_replaced_only_where_that_is_said(tmp_path, capsys, monkeypatch):
    plan = ["plan", "--config", "toy.yaml", "--json", str(tmp_path / "plan.json")]
    assert main(plan) == 0
    (tmp_path / "plan.json").write_text("mine")
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "index.json").touch()
    capsys.readouterr()
    for words in (plan, ["search", "a star", "--index", str(tmp_path), "--png", str(tmp_path / "a.png")]):
        assert main(words) == 2
        assert "is there already" in (said := capsys.readouterr().err) and "--overwrite" in said
    assert (tmp_path / "plan.json").read_text() == (tmp_path / "a.png").read_text() == "mine"
    assert main([*plan, "--overwrite"]) == 0 and "mine" not in (tmp_path / "plan.json").read_text()


def test_every_command_that_writes_has_overwrite_or_goes_on():
    """What is left: folders that are taken up where they belong to the same work, and refused otherwise."""
    folders = {name for name in COMMANDS if "--out" in options_of(COMMANDS[name])}
    assert {name for name in folders if "--overwrite" not in options_of(COMMANDS[name])} == {
        "toy make", "toy demo", "photos", "features", "index embed"
    }  # fmt: skip
    files = {name for name in COMMANDS if set(FILES) & set(option_names(name))}
    assert "eval coco" in files and all("overwrite" in option_names(name) for name in files)


def option_names(command):
    return [action.dest for action in parser_of(command, COMMANDS[command])._actions]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "a file: cannot be written (No space left on device); make room"),
        (OSError(27, "x", "/mnt/a"), "/mnt/a: cannot be written (File too large); make room, or name another place"),
        (PermissionError(13, "x", "/mnt/a"), "/mnt/a: cannot be opened (Permission denied); see to its permissions"),
        (OSError(30, "x", "/mnt/a"), "/mnt/a: cannot be opened (Read-only file system)"),
    ],
)
def test_what_a_disk_refuses_is_one_line_wherever_it_is_met(error, said, monkeypatch, capsys):
    def fails(*, config: str) -> None:
        """Fails."""
        raise error

    monkeypatch.setitem(COMMANDS, "plan", fails)
    assert main(["plan", "--config", "toy.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"fromage: {said}")
    assert main(["plan", "--config", "toy.yaml", "--debug"]) == 1 and "Traceback" in capsys.readouterr().err


def test_reports_are_sentences_with_their_place(world, tmp_path, monkeypatch, capsys):
    made = {"version": 3, "seed": 0, "counts": {"train": 5, "val": 2}, "made": True}
    monkeypatch.setattr("fromage.toy.world.make_world", lambda *given, **named: made)
    assert main(["toy", "make", "--out", str(tmp_path / "w")]) == 0
    assert capsys.readouterr().out == f"toy world: 5 train, 2 val -> {tmp_path / 'w'}\n"
    names = [f"{i}.jpg" for i in range(5)]
    first = next((world / "coco" / "val2017").iterdir())
    (tmp_path / "a.tsv").write_text("".join(f"a star\t{name}\n" for name in [*names, str(first)]))
    assert main(["shards", "tsv", str(tmp_path / "a.tsv"), "--out", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "s") in said and "missing image" in said and "2.jpg" in said and "3.jpg" not in said
    assert "2 more" in said and not re.search(r"\w+\(\w+=|\{'", said)


def test_a_warning_is_one_line():
    program = (
        "import sys, warnings; from fromage.cli.main import COMMANDS, main\n"
        "COMMANDS['plan'] = lambda: warnings.warn('two are left out')\n"
        "main(['plan'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr == "warning: two are left out\n"


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    program = (
        "import sys; from fromage.cli.main import COMMANDS, main\n"
        "COMMANDS['plan'] = lambda: [print('a line', flush=True) for _ in iter(sys.stdin.readline, '')]\n"
        "sys.exit(main(['plan']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, stderr=-1, text=True)
    process.stdin.write("more\n")
    process.stdin.flush()
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    process.stdout = None
    assert (process.communicate("more\nmore\n", timeout=120)[1], process.returncode) == ("", 128 + signal.SIGPIPE)


def test_help_lists_all_verbs_and_tells_defaults(capsys):
    for words, told in (
        (["--help"], "index add "),
        (["demo", "--help"], "default: 7860"),
        (["search", "--help"], "default: 5"),
        (["search", "--index", "nowhere", "--help"], "default: 5"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["index", "embed", "--ckpt", "a", "--images", "", "--out", "b"],
        ["index", "embed", "--ckpt", "", "--images", "a", "--out", "b"],
        ["search", "", "--index", "a"],
        ["chat", "--system="],
    ],
)
def test_empty_words_are_refused(words, capsys):
    assert main(words) == 2 and "is empty" in capsys.readouterr().err


def test_both_names_are_installed():
    for name in ("fromage", "lightning"):
        path = shutil.which(name, path=str(Path(sys.executable).parent))
        assert path and "fit" in subprocess.run([path, "--help"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("verb", ["chat", "demo", "serve"])
def test_a_folder_of_images_without_an_index_is_refused(verb, tmp_path, capsys):
    assert main([verb, "--images", str(tmp_path)]) == 2
    assert "give --index too" in capsys.readouterr().err


def test_files_with_a_hash_in_their_names_are_files(tmp_path):
    (tmp_path / "photo#1.jpg").touch()
    (tmp_path / "a.tar").touch()
    for there in ("photo#1.jpg", "a.tar#key"):
        assert in_image(str(tmp_path / there)) == str(tmp_path / there)
    for gone in ("photo#2.jpg", "b.tar#key", "photo"):
        with pytest.raises(UserError, match="no such file"):
            in_image(str(tmp_path / gone))


def test_a_name_that_is_too_long_is_one_line(capsys):
    for words in (["caption", "a" * 300, "--ckpt", "x"], ["photos", __file__, "--images", "b" * 300]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "the name is too long" in told and told.count("\n") == 1


def test_training_within_a_command_gets_the_signals_that_it_saves_at(monkeypatch):
    """The command's own handler would end the run before the trainer has saved."""
    seen, mine = [], lambda *_: None
    note = lambda *_, **__: seen.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr("fromage.training.lightning_cli.CommandLine", note)
    former = signal.signal(signal.SIGTERM, mine)
    try:
        run_lightning(["fit"])
        assert seen == [signal.SIG_DFL] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, former)
