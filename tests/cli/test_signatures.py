"""Commands derived from signatures: what their options say, their help, completion, and a quick start."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from fromage.cli.command import arguments, call
from fromage.cli.main import COMMANDS, main, parse
from fromage.cli.options import HERE
from fromage.cli.talk import Opening
from fromage.errors import UserError
from fromage.generation.options import DEFAULTS, HELP, LIMITS, Decoding
from fromage.training.configs import config_folder

HEAVY = ("torch", "transformers", "pytorch_lightning", "open_clip", "numpy", "PIL", "gradio", "fastapi")
LINES = {  # command line: what it says of some options, defaults among them
    "toy make --out w --train 5": {"out": Path("w"), "train": 5, "val": 1000, "refs": 500, "seed": 0},
    "toy demo": {"out": Path("runs/demo")},
    "shards tsv a.tsv --out o --per-shard 7": {"tsv": Path("a.tsv"), "images": None, "per_shard": 7},
    "shards jsonl a.jsonl --out o --val-fraction 0.1": {"jsonl": Path("a.jsonl"), "val_fraction": 0.1, "images": None},
    "shards coco c.json --images i --out o --captions first": {"annotations": Path("c.json"), "val_fraction": 0.0},
    "shards tuples a.jsonl --out o --images i": {"jsonl": Path("a.jsonl"), "images": Path("i"), "per_shard": 1000},
    "tuples toy --out o --count 3 --split val": {"count": 3, "split": "val", "changes": 1, "overwrite": False},
    "tuples make c.json --out o --lm smollm2 --temperature 0": {"lm": "smollm2", "temperature": 0.0, "images": None},
    "shards check a b --max-broken 0.5 --png p.PNG": {"shards": ["a", "b"], "max_broken": 0.5, "png": Path("p.PNG")},
    "photos c.json --images i --options=--trainer.max_steps=3": {"lm": "smollm2", "options": ["--trainer.max_steps=3"]},
    "photos c.json --images i --val-fraction 0.2": {"val_fraction": 0.2, "out": Path("runs/photos")},
    "towers list": {"json": None},
    "towers get smollm2 --json": {"name": "smollm2"},
    "features s --out o --workers 2": {"workers": 2},
    "features s --out o --keep-images --batch_size 3": {"keep_images": True, "batch_size": 3, "vision_weights": "openai"},
    "plan -c toy.yaml --batch-size 9 --stored-features": {"config": ["toy.yaml"], "batch_size": 9, "stored_features": True},
    "import d --out o --vision toy": {"source": Path("d"), "vision": "toy", "dtype": "bfloat16"},
    "export --ckpt c --out o --format authors": {"ckpt": "c", "format": "authors", "dtype": None},
    "export --ckpt c --out o --license mit": {"license": "mit", "visual_encoder": None},
    "index embed --ckpt c --images i --out o --ray": {"ckpt": "c", "ray": "local", "actors": 1, "gpus": None},
    "index embed --ckpt c --images i --out o --ray=auto --gpus 0.5": {"ray": "auto", "gpus": 0.5},
    "index build --embeddings e --out o --kind IVF8,Flat": {"embeddings": Path("e"), "kind": "IVF8,Flat", "images": None},
    "index build --embeddings e --out o --kind auto:small --table p --key file": {"kind": "auto:small", "table": Path("p")},
    "index add i --embeddings e": {"index": Path("i"), "embeddings": Path("e"), "table": None},
    "index describe i --table p --key file": {"index": Path("i"), "table": Path("p"), "key": "file"},
    "index remove i a b": {"index": Path("i"), "path": ["a", "b"]},
    "index sync i --images e --captions c": {"index": Path("i"), "ckpt": None},
    "index trust i": {"index": Path("i"), "images": None},
    "index merge i j --out o": {"index": [Path("i"), Path("j")], "milvus": None},
    "index import p q --ckpt c --out o": {"source": [Path("p"), Path("q")]},
    "index sync i --images j": {"index": Path("i"), "images": Path("j"), "ckpt": None, "captions": None},
    "index info i --check": {"check": True},
    "search null 1e3 --index i --image a --image b -k 2": {
        "text": ["null", "1e3"],
        "image": ["a", "b"],
        "images_per_ret": 2,
    },
    "search x --index i --where a=1": {"where": "a=1"},
    "search --index i": {"text": [], "image": [], "where": "", "images_per_ret": 5, "json": None, "device": "auto"},
    "search x --index i --json": {"json": HERE, "text": ["x"]},
    "search --json x --index i": {"json": HERE, "text": ["x"]},
    "search --json x.JSON --index i": {"json": Path("x.JSON"), "text": []},
    "caption a i https://x/y.png --max-new-tokens 8": {
        "image": ["a", "i", "https://x/y.png"],
        "max_new_tokens": 8,
        "ckpt": None,
    },
    "ground i.png star --top 0": {"image": "i.png", "text": "star", "top": 0, "question": "where is {}?"},
    "eval coco a --ckpt c --images i --no-clip": {"clip": False, "limit": None, "max_lost": 0.05, "split": "test"},
    "eval flickr30k a --ckpt c --images i --captioning": {"captioning": True, "clip": True},
    "eval vist a --ckpt c --images i --limit 3": {"limit": 3},
    "eval visdial a --dense d --ckpt c --images i --no-answers": {"answers": False, "dense": Path("d"), "scores": None},
    "eval circo a --gallery b --ckpt c --images i --server-files o": {"gallery": Path("b"), "server_files": Path("o")},
    "eval cirr a --gallery b --ckpt c --images i --overwrite": {"overwrite": True, "server_files": None},
    "eval fashioniq s --ckpt c --images i --no-clip": {"dataset": Path("s"), "clip": False},
    "eval genecis f g --ckpt c --images i": {"files": [Path("f"), Path("g")], "limit": None},
    "eval chatir a --gallery b --ckpt c --images i": {"annotations": Path("a"), "gallery": Path("b")},
    "eval few-shot --world w --ckpt c --shots 1 2": {"shots": [1, 2]},
    "eval few-shot --world w --ckpt c": {"shots": [0, 1, 2, 4]},
    "eval refcoco r --instances n --ckpt c --images i --match x": {"match": "x", "split": ["val"]},
    "eval refcoco r --instances n --ckpt c --images i --split val testA": {"split": ["val", "testA"], "features": None},
    "eval pope f g --ckpt c --images i": {"files": [Path("f"), Path("g")], "workers": 0},
    "eval answers q --answers-file o.jsonl --ckpt c --images i": {"answers_file": Path("o.jsonl"), "max_new_tokens": 128},
    "eval instructions f --ckpt c --images i --padded": {"padded": True},
    "eval spotting f --ckpt c --images i": {"folder": Path("f"), "split": "test"},
    "chat -k 3": {"images_per_ret": 3},
    "chat --ret_bias -3 --max-new-tokens 8 --stop . --stop x": {"ret_bias": -3.0, "max_new_tokens": 8, "stop": [".", "x"]},
    "tune-ret c c.json --style alone": {"ckpt": "c", "messages": Path("c.json"), "style": "alone", "system": None},
    "demo --port 80 --style alone": {"port": 80, "host": "127.0.0.1", "style": "alone"},
    "eval mteb --ckpt c --tasks A --tasks B": {"tasks": ["A", "B"], "batch_size": 64},
    "serve --cors https://a.example": {"cors": ["https://a.example"], "api_key_file": None},
    "serve --queue 2": {"queue": 2, "timeout": 60.0, "batch_size": 16},
    "completion bash": {"shell": "bash"},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The files and folders that the lines name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a.jsonl", "a.tsv", "b", "c", "c.json", "d", "f", "g", "i.png", "n", "p", "q", "r"):
        Path(name).touch()
    for name in ("e", "i", "j", "s", "w"):
        Path(name).mkdir()
        Path(name, "index.json").touch()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("line", LINES)
def test_a_line_says_what_it_always_said(line):
    function, values = parse(line.split())
    assert function in COMMANDS.values() and {name: values[name] for name in LINES[line]} == LINES[line]


@pytest.mark.usefixtures("place")
def test_every_command_is_among_these_lines():
    assert {parse(line.split())[0] for line in LINES} == set(COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and told.startswith(f"usage: fromage {name}") and "likewise" not in told
    rows = told.partition("\n\n")[2].splitlines()
    for row, after in zip(rows, [*rows[1:], ""], strict=True):
        if row.startswith("  -"):
            assert "  " in row.strip() or after.startswith("      "), f"{row}: not explained"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--help", "fit Train by a configuration (Lightning's fit)"),
        ("toy make --help", "--overwrite replace the file of --json if it is there; --out is not affected"),
        ("search --help", "--overwrite replace the file of --json or --png if it is there"),
        ("eval coco --help", "--no-clip leave out the frozen CLIP's figures"),
        ("eval visdial --help", "--no-answers only find the image by the dialogue"),
        ("chat --help", "--no-use-cache run the whole sequence again for every token"),
        ("serve --help", "in tokens, with all tokens of each [RET] (default: the model's generation.json, else 32)"),
        ("demo --help", "--ret-bias RET_BIAS added to the logit of [RET]; higher gives more images (default: the model's"),
    ],
)
def test_help_says_what_an_option_does_and_what_holds_without_it(line, told, capsys):
    with pytest.raises(SystemExit):
        main(line.split())
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_function_gets_what_was_said(monkeypatch):
    def command(*, opening: Opening, decoding: Decoding, top: int = 5) -> None:
        """Do nothing."""
        got.append((opening, decoding, top))

    got: list = []
    monkeypatch.setitem(COMMANDS, "chat", command)
    monkeypatch.setitem(command.__globals__, "Opening", Opening)
    assert main(["chat", "--ckpt", "someone/c", "--images-per-ret", "2", "--no-use-cache", "--top", "3"]) == 0
    assert got == [(Opening(ckpt="someone/c"), Decoding(images_per_ret=2, use_cache=False), 3)]
    assert main(["chat", "--min-tokens", "50"]) == 2


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["fit", "--config", "toy.yaml", "--model.wormup_steps=3"], "did you mean --model.warmup_steps?"),
        (["fit", "--config", "toy.yaml", "--data.batchsize=3"], "did you mean --data.batch_size?"),
        (["fit", "--config", "toy.yaml", "--trainer.max_stepz=3"], "did you mean --trainer.max_steps?"),
        (["fit", "--config", "toy.yaml", "--trainer.strategy=fromage.ShardedTower"], "did you mean fromage.ShardedTowers?"),
        (["fit", "--config", "toy.yaml", "--trainer.strategy=nowhere.DDP"], "no module nowhere"),
        (["fit", "--config", "toy.yaml", "--model.K=3"], "did you mean --model.k?"),
        (["eval", "vost"], "did you mean eval vist?"),
        (
            ["photos", __file__, "--images", ".", "--trainer.max_steps=3"],
            "give it to the training as --options=--trainer.max_steps=",
        ),
        (["serch"], "did you mean search?"),
        (["index"], "name a command: index embed"),
        ([], "name a command"),
    ],
)
def test_what_was_meant_is_told(words, meant, capsys):
    assert main(words) == 2 and meant in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--version"], 0), (["index", "--help"], 0), (["serch"], 2), (["search"], 2), (["search", "-h"], 0),
     (["chat", "--help"], 0), (["eval", "coco", "--bogus"], 2)],
)  # fmt: skip
def test_help_version_and_wrong_words_load_no_heavy_module(words, code):
    program = (
        "import sys; from fromage.cli.main import main\n"
        f"try: code = main({words!r})\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print(code or 0, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} []"


def test_help_of_fit_tells_the_configurations_before_lightning_is_imported():
    program = (
        "import sys; sys.modules['pytorch_lightning'] = None; from fromage.cli.main import main; main(['fit', '--help'])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert "lightning fit --config cc3m.yaml" in told and "--model.help fromage.FromageModule" in told
    lines = dict(line.split(maxsplit=1) for line in told.splitlines() if ".yaml  " in line)
    assert lines["photos.yaml"].startswith("FROMAGe on real photographs")
    assert lines.keys() == {path.name for path in config_folder().glob("*.yaml")} and all(lines.values())


def test_the_package_runs_and_tells_its_version():
    done = subprocess.run([sys.executable, "-m", "fromage", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fromage ") and done.stdout.strip()[-1].isdigit()


def test_bash_completes_commands_and_options(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    for line, found in (("index bu", "build"), ("index build --embe", "--embeddings"), ("fi", "fit"), ("eval po", "pope")):
        words = ["fromage", *line.split()]
        ask = (
            f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{' '.join(words)}'\n"
            f"_shtab_fromage fromage {words[-1]} {words[-2]}; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
        assert found in done.stdout.split(), (line, done)


def test_the_options_of_an_answer_stand_once():
    schema = pytest.importorskip("fromage.serving.schema")
    properties = schema.DecodingOptions.model_json_schema()["properties"]
    served = {name for name, limits in LIMITS.items() if limits.served}
    assert properties.keys() == served | {"stop", "end_at_image"} and HELP.keys() == DEFAULTS.keys()
    for name in served:
        assert (properties[name]["description"], properties[name]["default"]) == (HELP[name], DEFAULTS[name])
        least, most = LIMITS[name].served
        for bound in (least, most):
            getattr(schema.DecodingOptions(**{"max_new_tokens": 512, name: type(DEFAULTS[name] or 0)(bound)}), name)
        with pytest.raises(ValueError, match=name):
            schema.DecodingOptions(**{name: most + 1})
    for name in ("min_tokens", "min_new_tokens"):
        with pytest.raises(UserError, match=name):
            Decoding(max_new_tokens=3, **{name: 4})


def test_options_of_an_answer_come_before_the_models_own():
    """What is not said is left to generation.json; what means nothing is refused before any work."""
    function, values = parse(["chat", "--ret-bias", "0", "--stop", "x", "--end-at-image", "--no-use-cache"])
    given = call(get_type_hints(function)["decoding"], values)
    assert given.options() == {"ret_bias": 0.0, "stop": ["x"], "end_at_image": True, "use_cache": False}
    function, values = parse(["serve"])
    assert call(get_type_hints(function)["decoding"], values).options() == {}
    with pytest.raises(UserError, match="max-new-tokens: 0: give a whole number from 1"):
        parse(["demo", "--max-new-tokens", "0"])
    function, values = parse(["demo", "--temperature", "-1"])
    with pytest.raises(UserError, match="temperature"):
        call(get_type_hints(function)["decoding"], values)


EARLY = {  # command line: what its only line says, before a heavy library is imported
    "chat --ckpt none.ckpt": "none.ckpt: no such file",
    "tune-ret a/b gone.json": "gone.json: no such file",
    "chat --ckpt .": "holds no checkpoint and no config.json",
    "search x --index nowhere": "nowhere: cannot be read as an index",
    "search x --device cud --index nowhere": "give auto, cpu, cuda or mps",
    "caption gone.jpg": "gone.jpg: no such file",
    "chat --quantize int4": "quantize: int4: give int8, nf4, none",
    "completion fish": "shell: fish: give bash, zsh, tcsh",
    "index build --images nowhere --ckpt a/b --out o": "nowhere: no such folder",
    "index embed --images . --ckpt a/b --out o --captions gone.json": "gone.json: no such file",
    "features nowhere --out o": "nowhere: no such file or folder",
    "shards tsv . --out o": ".: is a folder",
    "eval coco gone.json --images . --ckpt a/b": "gone.json: no such file",
    "eval few-shot --world nowhere --ckpt a/b": "nowhere: no such folder",
    "import nowhere --out o": "nowhere: no such file or folder",
    "plan --config nobody.yaml": "configuration nobody.yaml",
    "fit --config nobody.yaml": "configuration nobody.yaml",
    "index build --out o --ckpt a/b": "give either --embeddings, or --images with --ckpt",
    "demo --port {taken}": "(Address already in use); give another --port",
    "serve --cors *": "give the origin of a page",
    "serve --api-key-file gone": "gone: no such file",
    "serve --host 192.0.2.1": "give another --host",
    "shards tsv /etc/hostname --out /proc/x/y": "/proc/x/y: cannot be made",
    f"features . --out {'x' * 300}": "cannot be made (File name too long)",
    "serve --port {taken}": "give another --port",
    "serve --port 65536": "from 0 to 65535",
    "serve --timeout -1": "give a number from 0 on",
}


@pytest.mark.parametrize("line", EARLY)
def test_what_is_wrong_is_told_before_anything_heavy_is_imported(line, tmp_path):
    program = (
        "import sys; from fromage.cli.main import main\n"
        f"code = main(sys.argv[1:]); print(code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = line.format(taken=taken.getsockname()[1]).split()
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 []\n" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fromage: ") and EARLY[line] in done.stderr


THERE = {  # what an output folder holds: a command that would replace it
    "train/00000.tar": "shards tsv {file} --val-fraction 0.1",
    "00000.tar": "shards coco {file} --images .",
    "index.json": "index build --images . --ckpt a/b",
    "config.json": "export --ckpt a/b",
    "model_args.json": "export --ckpt a/b --format authors",
    "model.safetensors": "import .",
}


@pytest.mark.parametrize("name", THERE)
def test_what_is_there_is_refused_before_anything_heavy_is_imported(name, tmp_path):
    for path in (tmp_path / "out" / name, tmp_path / "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    program = (
        "import sys; from fromage.cli.main import main\n"
        f"code = main(sys.argv[1:]); print(code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    words = [*THERE[name].format(file="file").split(), "--out", "out"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 []\n" and "is there already" in done.stderr and "--overwrite" in done.stderr, done.stderr


def test_a_runs_folder_is_a_checkpoint_before_it_is_opened(tmp_path):
    """In the words of the docs: the last checkpoint of the newest version."""
    for name in ("version_0", "version_1"):
        (tmp_path / "run" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        parse(["export", "--ckpt", str(tmp_path / "run"), "--out", "o"])
    (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").touch()
    for ckpt in (tmp_path / "run", tmp_path / "run" / "version_0"):
        assert parse(["export", "--ckpt", str(ckpt), "--out", "o"])[1]["ckpt"] == str(ckpt)


def test_what_measures_captions_is_looked_for_at_once(place, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["eval", "coco", "a", "--images", "i", "--ckpt", "c", "--captioning"]) == 2
    assert "Java" in capsys.readouterr().err


def test_one_name_means_one_thing():
    """An option has the same text in every command that has it, or none of its own."""
    meaning: dict = {}
    for name, function in COMMANDS.items():
        for names, settings in arguments(function):
            if names[0].startswith("-"):
                several = None if names[-1] == "--split" else settings.get("nargs")  # RefCOCO's are run together
                meaning.setdefault(names[-1], {})[name] = (settings.get("type") is None, several)
    assert all(len(set(kinds.values())) == 1 for kinds in meaning.values()), meaning
    for option, at in {"--device": "auto", "--images-per-ret": None}.items():
        given = [settings["default"] for f in COMMANDS.values() for names, settings in arguments(f) if option in names]
        assert len(given) > 1 and (at is None or set(given) == {at}), option
    shorts = [names for f in COMMANDS.values() for names, _ in arguments(f) if "-k" in names]
    assert shorts and all(names == ["-k", "--images-per-ret"] for names in shorts)
