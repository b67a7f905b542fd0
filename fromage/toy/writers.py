"""The toy world written in published formats: CC3M shards, COCO captions, Flickr30k, Visual Storytelling, VisDial.

Each writer takes the split's scenes, a random generator for the words, and `paint`, which turns (scene, jitter) pairs into
JPEG bytes and boxes in order. Entries carry one key more than the published ones: "scene", the key of the scene shown. What
points at objects is written by fromage.toy.grounding.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fromage.data.shard_writer import write_shards
from fromage.toy.language import ToyRound, ToyStory, answer_pool, caption, dialogue, story
from fromage.toy.masks import categories, instance
from fromage.toy.scenes import PIXELS, Mark, Scene, draw

Job = tuple[Scene, int]  # a scene, and the seed of its jitter
Drawn = tuple[bytes, list[Mark]]  # a JPEG file, and where its objects are
Paint = Callable[[Iterable[Job]], Iterator[Drawn]]

JPEG_QUALITY = 92
PER_SHARD = 1024
CAPTIONS = 5
CANDIDATES = 100
FIRST_ID = {"train": 1_000_001, "val": 1}  # so that image ids of the two splits never overlap
DATE = "2023-01-31 00:00:00"


def encode(job: Job) -> Drawn:
    """Draw a scene as a JPEG file, with its boxes clipped to the image."""
    image, marks = draw(*job)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue(), [Mark(_clipped(*mark.box), mark.outline) for mark in marks]


def _clipped(x: float, y: float, w: float, h: float) -> list[float]:
    left, top, right, bottom = max(0.0, x), max(0.0, y), min(float(PIXELS), x + w), min(float(PIXELS), y + h)
    return [round(v, 2) for v in (left, top, right - left, bottom - top)]


def write_json(path: Path, content: Any) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_images(folder: Path, names: list[str], jobs: list[Job], paint: Paint) -> list[list[Mark]]:
    """Write one JPEG per name; returns where the objects of each image are."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = []
    for name, (jpeg, found) in zip(names, paint(jobs), strict=True):
        (folder / name).write_bytes(jpeg)
        marks.append(found)
    return marks


def _ids(scenes: list[Scene], split: str) -> range:
    return range(FIRST_ID[split], FIRST_ID[split] + len(scenes))


def _size() -> dict[str, int]:
    return {"width": PIXELS, "height": PIXELS}


def write_cc3m(out: Path, split: str, scenes: list[Scene], rng: random.Random, paint: Paint) -> None:
    """Webdataset shards in the format of the ready-made copies of CC3M: jpg, txt, json, one caption per image."""

    def samples() -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
        jobs = list(zip(scenes, _ids(scenes, split), strict=True))
        for i, (scene, (jpeg, _)) in enumerate(zip(scenes, paint(jobs), strict=True)):
            key, text = f"{i:09d}", caption(scene, rng)
            if split == "train" and rng.random() < 0.3:  # as in captions by people
                text = text.removesuffix(".")
            meta = {"key": key, "caption": text, "url": "", "status": "success", "error_message": None, "exif": "{}"}
            yield key, jpeg, text, meta | _size() | {"sha256": hashlib.sha256(jpeg).hexdigest(), "scene": scene.key}

    write_shards(samples(), out / "cc3m" / split, per_shard=PER_SHARD)


def _captions(scene: Scene, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < CAPTIONS:
        found.setdefault(caption(scene, rng))
    return list(found)


def coco_header(what: str) -> dict[str, Any]:
    """The header of COCO's files."""
    info = {"description": what, "url": "", "version": "1.0", "year": 2023, "contributor": "", "date_created": DATE}
    return {"info": info, "licenses": [{"id": 1, "name": "Apache License 2.0", "url": ""}]}


def coco_image(image_id: int, name: str, scene: Scene) -> dict[str, Any]:
    """An entry of `images` in COCO's files."""
    entry = {"id": image_id, "file_name": name, "license": 1, "coco_url": "", "flickr_url": "", "date_captured": DATE}
    return entry | _size() | {"scene": scene.key}


def write_coco(out: Path, split: str, scenes: list[Scene], rng: random.Random, paint: Paint) -> list[tuple[str, Scene]]:
    """COCO in the 2017 layout: five different captions per image, and instances; returns the paths in `out`, and scenes."""
    ids = _ids(scenes, split)
    names = [f"{i:012d}.jpg" for i in ids]
    marks = write_images(out / "coco" / f"{split}2017", names, list(zip(scenes, ids, strict=True)), paint)
    images = [coco_image(*entry) for entry in zip(ids, names, scenes, strict=True)]
    shown = [
        (i, *pair)
        for i, scene, some in zip(ids, scenes, marks, strict=True)
        for pair in zip(scene.things, some, strict=True)
    ]
    notes = [instance(n, *one) for n, one in enumerate(shown, FIRST_ID[split])]
    objects = {"images": images, "annotations": notes, "categories": categories()}
    write_json(out / "coco" / "annotations" / f"instances_{split}2017.json", coco_header("toy world, instances") | objects)
    said = [(i, text) for i, scene in zip(ids, scenes, strict=True) for text in _captions(scene, rng)]
    content = coco_header("toy world, captions") | {
        "images": images,
        "annotations": [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(said, FIRST_ID[split])],
    }
    write_json(out / "coco" / "annotations" / f"captions_{split}2017.json", content)
    return [(f"coco/{split}2017/{name}", scene) for name, scene in zip(names, scenes, strict=True)]


def write_flickr30k(out: Path, split: str, scenes: list[Scene], rng: random.Random, paint: Paint) -> None:
    """Flickr30k in the format of Karpathy's splits: a split's images with five captions each, raw and in tokens."""
    ids = _ids(scenes, split)
    names = [f"{i}.jpg" for i in ids]
    write_images(out / "flickr30k" / "flickr30k-images", names, list(zip(scenes, ids, strict=True)), paint)
    images: list[dict[str, Any]] = []
    for i, (name, scene) in enumerate(zip(names, scenes, strict=True)):
        sentids = list(range(CAPTIONS * i, CAPTIONS * (i + 1)))
        said = [
            {"tokens": re.findall(r"\w+", text), "raw": text, "imgid": i, "sentid": n}
            for n, text in zip(sentids, _captions(scene, rng), strict=True)
        ]
        image = {"sentids": sentids, "imgid": i, "sentences": said, "split": "test" if split == "val" else split}
        images.append(image | {"filename": name, "scene": scene.key})
    write_json(out / "flickr30k" / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def sample_stories(rng: random.Random, split: str, count: int) -> list[ToyStory]:
    """Draw stories of a split whose last scenes are all different; the four before are training scenes in either split.

    So no image of the validation gallery shows what the last image of another story shows.
    """
    stories: dict[str, ToyStory] = {}
    while len(stories) < count:
        tale = story(rng, split)
        if all(scene.split == "train" for scene in tale.scenes[:-1]):
            stories.setdefault(tale.scenes[-1].key, tale)
    return list(stories.values())


def write_vist(out: Path, split: str, stories: list[ToyStory], paint: Paint) -> None:
    """Visual Storytelling, stories in sequence (SIS): one album of five photos per story, ids as strings."""
    scenes = [scene for tale in stories for scene in tale.scenes]
    ids, sentences = _ids(scenes, split), [text for tale in stories for text in tale.sentences]
    write_images(out / "vist" / "images" / split, [f"{i}.jpg" for i in ids], list(zip(scenes, ids, strict=True)), paint)
    images, annotations = [], []
    for n, (photo, scene, text) in enumerate(zip(ids, scenes, sentences, strict=True)):
        album, order = str(photo - n % 5), n % 5
        image = {"id": str(photo), "album_id": album, "datetaken": f"2023-01-31 12:00:0{order}", "license": "1"}
        images.append(image | {"title": "", "text": "", "tags": "", "url_o": "", "media": "photo", "scene": scene.key})
        told = {"story_id": album, "storylet_id": str(photo), "album_id": album, "photo_flickr_id": str(photo)}
        told |= {"original_text": text, "text": text, "tier": "story-in-sequence", "worker_id": "toy"}
        annotations.append([told | {"worker_arranged_photo_order": order, "setting": "first-2-pick-and-tell"}])
    albums = [{"id": str(i), "title": "", "description": "", "photos": "5"} for i in ids[::5]]
    content = {"info": {"version": "1.2"}, "type": "stories", "images": images, "albums": albums, "annotations": annotations}
    write_json(out / "vist" / "sis" / f"{split}.story-in-sequence.json", content)


def _plain(said: ToyRound) -> str:
    return said.question.removesuffix("?")


def _numbered(texts: set[str]) -> dict[str, int]:
    return {text: n for n, text in enumerate(sorted(texts))}


def _candidates(said: ToyRound, rng: random.Random) -> list[str]:
    """The answer, equivalent ones, and wrong ones up to CANDIDATES in all, in random order."""
    right = [said.answer, *said.same]
    wrong = [a for a in answer_pool() if a not in right]
    listed = right + rng.sample(wrong, CANDIDATES - len(right))
    rng.shuffle(listed)
    return listed


def _relevance(said: ToyRound, candidates: list[str], rng: random.Random) -> list[float]:
    return [1.0 if a == said.answer else rng.choice((0.5, 0.75, 1.0)) if a in said.same else 0.0 for a in candidates]


def write_visdial(out: Path, split: str, scenes: list[Scene], rng: random.Random, paint: Paint) -> None:
    """VisDial 1.0 of ten rounds: questions without their question mark, as published; candidates for val only.

    Train dialogues are about the first images of coco/train2017, whose ids they have. Those of val get images of their
    own, a list of CANDIDATES answers per question, and dense relevance for one round (counted from 1) per dialogue.
    """
    ids, talks = _ids(scenes, split), [dialogue(scene, rng) for scene in scenes]
    said = [r for _, rounds in talks for r in rounds]
    questions = _numbered({_plain(r) for r in said})
    answers = _numbered({a for r in said for a in (r.answer, *r.same)} | set(answer_pool()))
    dialogs, dense = [], []
    for image_id, scene, (short, rounds) in zip(ids, scenes, talks, strict=True):
        talk: list[dict[str, Any]] = [{"question": questions[_plain(r)], "answer": answers[r.answer]} for r in rounds]
        dialogs.append({"image_id": image_id, "caption": short, "dialog": talk, "scene": scene.key})
        if split == "val":
            options = [_candidates(r, rng) for r in rounds]
            for entry, r, listed in zip(talk, rounds, options, strict=True):
                entry |= {"answer_options": [answers[a] for a in listed], "gt_index": listed.index(r.answer)}
            rated = rng.randrange(len(rounds))
            relevance = _relevance(rounds[rated], options[rated], rng)
            dense.append({"image_id": image_id, "round_id": rated + 1, "gt_relevance": relevance})
    data = {"questions": list(questions), "answers": list(answers), "dialogs": dialogs}
    write_json(out / "visdial" / f"visdial_1.0_{split}.json", {"version": "1.0", "split": split, "data": data})
    if split == "val":
        write_json(out / "visdial" / "visdial_1.0_val_dense_annotations.json", dense)
        names = [f"VisualDialog_val2018_{i:012d}.jpg" for i in ids]
        write_images(out / "visdial" / "images" / "val", names, list(zip(scenes, ids, strict=True)), paint)
