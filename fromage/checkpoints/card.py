"""The model card: what a folder of trained parameters tells people of them, README.md on the model hub.

What is known of a training travels with the parameters as `about`, a dictionary in config.json:

    license    the hub's name of a licence, such as apache-2.0
    source     where the parameters are from, if not from a run of this program
    steps, examples, hours    how long the run was
    data       the configuration's `data`; of paths and addresses the last two parts alone, since the folder is published
    recipe     hyperparameters of the run
    figures    name -> [last value, step] of the run's validations

Each may be missing: the card then says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fromage.errors import UserError
from fromage.printable import one_line, printable

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
FIGURE = re.compile(r"val/\w{1,60}")
RECIPE = (
    "lr", "betas", "eps", "warmup_steps", "decay_steps", "pairing", "captioning_weight", "captioned_share",
    "retrieval_weight", "composition_captioning_weight", "composition_retrieval_weight", "same_image_negatives",
    "image_dropout", "rescale_ret", "freeze_temperature", "stage", "quantize", "seed",
)  # fmt: skip
LENGTH, ENTRIES, DEPTH = 200, 100, 8  # of what a file may tell: characters of a text, entries of a list, lists in each other
TOY = "The toy towers know drawings of coloured shapes and their captions, and nothing else."
REPORT = "RunReport"  # the callback whose state in a checkpoint has the figures of a run


def about_run(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a Lightning checkpoint tells of its run. Figures and data are those of fromage.training.run_report."""
    report = (checkpoint.get("callbacks") or {}).get(REPORT)
    report = report if isinstance(report, dict) else {}
    curves: Any = report.get("curves")
    curves = curves if isinstance(curves, dict) else {}
    told = {
        "steps": checkpoint.get("global_step"),
        "examples": report.get("examples"),
        "hours": report["seconds"] / 3600 if isinstance(report.get("seconds"), float) else None,
        "data": report.get("data"),
        "recipe": dict(checkpoint["hyper_parameters"]),
        "figures": {name: [*curve[-1]][::-1] for name, curve in curves.items() if isinstance(curve, list) and curve},
    }
    return checked(told)


def about_data(config: str) -> dict[str, Any]:
    """The `data` of a configuration's YAML as it may be published; {} where there is none."""
    try:
        read = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    data = _plain(read.get("data") if isinstance(read, dict) else None)
    return data if isinstance(data, dict) else {}


def checked(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of `about` is as the head of this file says; the rest is left out, since files of strangers have it too."""
    kept: dict[str, Any] = {
        name: about[name] for name in ("steps", "examples") if type(about.get(name)) is int and about[name] > 0
    }
    if _is_number(about.get("hours")) and about["hours"] >= 0:
        kept["hours"] = round(float(about["hours"]), 4)
    if isinstance(about.get("license"), str) and LICENSE.fullmatch(about["license"]):
        kept["license"] = about["license"]
    if isinstance(about.get("source"), str) and about["source"]:
        kept["source"] = _text(about["source"])
    recipe = about.get("recipe")
    if isinstance(recipe, dict):
        kept["recipe"] = {name: _plain(recipe[name]) for name in RECIPE if recipe.get(name) is not None}
    figures = about.get("figures")
    if isinstance(figures, dict):
        kept["figures"] = {name: [float(pair[0]), int(pair[1])] for name, pair in list(figures.items())[:ENTRIES]
                           if FIGURE.fullmatch(str(name)) and isinstance(pair, list | tuple) and len(pair) == 2
                           and all(map(_is_number, pair))}  # fmt: skip
    data = _plain(about.get("data"))
    if isinstance(data, dict):
        kept["data"] = data
    return {name: value for name, value in kept.items() if value not in ({}, None)}


def licensed(about: Mapping[str, Any], license: str | None) -> dict[str, Any]:
    """`about` with a licence (None: as it was). Raises UserError for what is no name of one on the hub."""
    if license is None:
        return dict(about)
    if not LICENSE.fullmatch(license):
        raise UserError(f"license {license[:80]!r}: give the model hub's name of it, such as apache-2.0, mit or cc-by-4.0")
    return {**about, "license": license}


def write_card(config: Mapping[str, Any], front: str, title: str, lead: str, use: str, limits: str) -> str:
    """A card in Markdown: its head, what it is, how to use it, licence, training, figures, limits.

    config: as in config.json. front: further lines of the head; title, lead, use, limits: Markdown.
    """
    about = checked(config.get("about") or {})
    towers = [str(config[name]) for name in ("lm", "vision")]
    head = f"license: {about['license']}\n{front}" if "license" in about else front
    limits = f"{limits}\n{'- ' + TOY if 'toy' in towers else ''}".rstrip()
    parts = [f"---\n{head.strip()}\n---", f"# {one_line(title)}", lead, "## How to use it", use]
    parts += ["## Licence", _licence(about, towers), "## Training", *_training(about)]
    parts += ["## Figures", *_figures(about), "## Limits", limits]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def fromage_card(config: Mapping[str, Any], count: int) -> str:
    """Of FROMAGe with so many trained parameters."""
    lead = f"""The {count:,} trained parameters of [FROMAGe](https://arxiv.org/abs/2301.13823) between a frozen language
model and a frozen vision tower, with {config["k"]} input embeddings per image and {config["q"]} dimensions of retrieval.
The towers are fetched by their names in config.json."""
    use = """    from pathlib import Path
    from fromage import Fromage
    model = Fromage.from_pretrained("FOLDER OR NAME OF THIS")
    print(model.caption(Path("image.jpg")))

`fromage index build --ckpt THIS --images PHOTOS --out INDEX` makes an index of images; `fromage search`, `fromage chat` and
`fromage serve` with `--index INDEX` use it."""
    front = "library_name: fromage\ntags:\n- arxiv:2301.13823"
    return write_card(config, front, f"FROMAGe on {config['lm']} and {config['vision']}", lead, use, FROMAGE_LIMITS)


def octopus_card(config: Mapping[str, Any], count: int) -> str:
    """Of Octopus with so many trained parameters."""
    lead = f"""The {count:,} trained parameters of a reconstruction of Octopus (Zhao et al., NeurIPS 2024), a multi-modal
language model that points at objects, with {config.get("num_queries", 0)} object queries. The language model and the image
tower are fetched by their names in config.json."""
    use = """    from fromage import Octopus
    model = Octopus.from_pretrained("FOLDER OR NAME OF THIS")

`fromage ground IMAGE "the small star" --ckpt THIS` draws what it points at."""
    title = f"Octopus on {config['lm']} and {config['vision']}"
    return write_card(config, "library_name: fromage", title, lead, use, OCTOPUS_LIMITS)


FROMAGE_LIMITS = """- It answers with images of an index alone. It makes no image, and shows whatever the index holds.
- Captions and answers may be wrong, and repeat the biases of the frozen language model and vision tower. Nothing was done
  against that in training. Check answers before anyone relies on them.
- It was trained on single captions, and on image and words together where the recipe has composition weights. Several images
  in a prompt, long dialogues and instructions go beyond that.
- A score is a cosine between a query and an image, and no probability."""
OCTOPUS_LIMITS = """- A reconstruction: no code and no weights of Octopus were published.
- Boxes and answers may be wrong, and repeat the biases of the language model and the vision tower. Check them before anyone
  relies on them.
- At most one box for each object query, and none of a kind of object that the training data do not name."""


def _licence(about: Mapping[str, Any], towers: list[str]) -> str:
    said = about.get("license")
    own = f"These parameters: {said}." if said else "Not stated; who publishes these parameters names it (`license:` above)."
    if others := [f"`{_text(name)}`" for name in towers if name != "toy"]:
        own += f" {' and '.join(others)} {'have licences' if len(others) > 1 else 'has a licence'} of their own, which"
        own += " hold wherever this is used." if len(others) > 1 else " holds wherever this is used."
    return f"{own} The training data may have licences too. The program, `fromage-torch`, is under Apache-2.0."


def _training(about: Mapping[str, Any]) -> list[str]:
    rows = [("from", about.get("source"))]
    rows += [(name, f"{about[name]:,}") for name in ("steps", "examples") if name in about]
    rows += [("hours", f"{about['hours']:.3g}, validations included")] if "hours" in about else []
    rows += [(name, value) for name, value in about.get("recipe", {}).items()]
    table = [f"| {name} | {_text(value)} |" for name, value in rows if value is not None]
    parts = ["\n".join(["| run | |", "|---|---|", *table])] if table else ["Of the run nothing is recorded."]
    if not (data := about.get("data")):
        return [*parts, "Training data: not recorded."]
    written = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return [*parts, "Training data, as the configuration has it (of paths the last two parts):", _indented(written)]


def _figures(about: Mapping[str, Any]) -> list[str]:
    if not (figures := about.get("figures")):
        return ["None is recorded. `fromage eval` measures them."]
    rows = [f"| {name.removeprefix('val/')} | {value:.4g} | {step:,} |" for name, (value, step) in sorted(figures.items())]
    told = "Of the run's own validation set, at its last validation; recalls in percent. They say nothing of other images."
    return [told, "\n".join(["| figure | value | at step |", "|---|---:|---:|", *rows])]


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: object) -> str:
    """A value in one cell of a table."""
    return printable(one_line(str(value)))[:LENGTH].replace("|", "/").replace("`", "'")


def _plain(value: Any, depth: int = DEPTH) -> Any:
    """Numbers, texts, lists and dictionaries; None for anything else. Of paths and addresses the last two parts."""
    if isinstance(value, dict) and depth:
        plain = {_text(name): _plain(each, depth - 1) for name, each in list(value.items())[:ENTRIES]}
        return {name: each for name, each in plain.items() if each is not None}
    if isinstance(value, list | tuple) and depth:
        return [_plain(each, depth - 1) for each in list(value)[:ENTRIES]]
    if isinstance(value, str):
        return _shown(value)
    return value if isinstance(value, bool) or _is_number(value) else None


def _shown(text: str) -> str:
    """A text that may be a path, an address, or a command that yields data: what of it tells nothing of a machine."""
    if text.startswith("pipe:"):
        return "pipe: a command"
    remote = "://" in text
    parts = [part for part in re.split(r"[/\\]", text.partition("?")[0] if remote else text) if part]
    last = "/".join(part.rpartition("@")[2] if remote else part for part in parts[-2:])  # without a user's name and password
    return _text(last if remote or Path(text).is_absolute() or len(parts) > 2 else text)
