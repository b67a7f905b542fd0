"""Commands of evaluation: FROMAGe's tables, each beside the frozen CLIP and chance, and those of Octopus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fromage.cli.command import Result
from fromage.cli.eval_options import (
    CaptionOptions,
    EvalOptions,
    ImageOptions,
    OctopusOptions,
    RetrievalOptions,
    ServedOptions,
)
from fromage.config import AsLoaded

QUESTION = "where is {}?"
Split = Literal["val", "testA", "testB", "test", "train"]


def coco(annotations: Path, *, eccv: bool = False, run: CaptionOptions) -> Result:
    """Captions and images of COCO: recall both ways.

    Args:
        annotations: captions_val2017.json, or Karpathy's dataset_coco.json; with --eccv captions_val2014.json
        eccv: take COCO's test split, and count matches too that its captions miss: ECCV Caption and CxC
    """
    return run.captions(annotations, "coco", eccv)


def flickr30k(annotations: Path, *, run: CaptionOptions) -> Result:
    """Captions and images of Flickr30k: recall both ways.

    Args:
        annotations: Karpathy's dataset_flickr30k.json
    """
    return run.captions(annotations, "flickr30k")


def vist(annotations: Path, *, run: RetrievalOptions) -> Result:
    """Stories of VIST: which image is the last one.

    Args:
        annotations: val.story-in-sequence.json
    """
    from fromage.evals.vist import evaluate, read_stories

    return run.judged(lambda: read_stories(annotations, run.images, run.limit), evaluate)


def visdial(
    annotations: Path, *, dense: Path, answers: bool = True, scores: Path | None = None, run: RetrievalOptions
) -> Result:
    """Dialogues of VisDial: rank answers, and find the image.

    Args:
        annotations: visdial_1.0_val.json
        dense: visdial_1.0_val_dense_annotations.json
        answers: rank answers too. --no-answers: only find the image by the dialogue; do not rank answers
    """
    from fromage.evals.dialogues import read_dialogues
    from fromage.evals.visdial import evaluate

    return run.judged(lambda: read_dialogues(annotations, dense, run.images, run.limit), evaluate, answers, scores)


def circo(annotations: Path, *, gallery: Path, run: ServedOptions) -> Result:
    """Composed retrieval, CIRCO: mAP@5, 10, 25 and 50 of an image and words.

    Args:
        annotations: val.json or test.json
        gallery: image_info_unlabeled2017.json of COCO, the images that are searched
    """
    from fromage.evals.circo import evaluate, read_circo

    return run.judged(
        lambda: run.check(read_circo(annotations, gallery, run.images, run.limit), "circo_*.json"),
        evaluate,
        run.server_files,
        run.overwrite,
    )


def cirr(annotations: Path, *, gallery: Path, run: ServedOptions) -> Result:
    """Composed retrieval, CIRR: recalls among all images, and within sets of six.

    Args:
        annotations: cap.rc2.val.json or cap.rc2.test1.json
        gallery: split.rc2.val.json of the same split, the images that are searched
    """
    from fromage.evals.cirr import evaluate, read_cirr

    return run.judged(
        lambda: run.check(read_cirr(annotations, gallery, run.images, run.limit), "cirr_*.json"),
        evaluate,
        run.server_files,
        run.overwrite,
    )


def fashioniq(dataset: Path, *, run: RetrievalOptions) -> Result:
    """Composed retrieval, FashionIQ: R@10 and R@50 of dresses, shirts and tops.

    Args:
        dataset: folder with captions/cap.dress.val.json, image_splits/split.dress.val.json and the other kinds' files
    """
    from fromage.evals.fashion_iq import evaluate, read_fashion_iq

    return run.judged(lambda: read_fashion_iq(dataset, run.images, limit=run.limit), evaluate)


def genecis(files: Sequence[Path], *, run: RetrievalOptions) -> Result:
    """Composed retrieval, GeneCIS: R@1, 2 and 3 of four tasks; --images holds val2017, VG_100K and VG_100K_2.

    Args:
        files: focus_attribute.json, change_attribute.json, focus_object.json and change_object.json, or some of them
    """
    from fromage.evals.genecis import evaluate, read_genecis

    return run.judged(lambda: read_genecis(files, run.images, run.limit), evaluate)


def chatir(annotations: Path, *, gallery: Path, run: RetrievalOptions) -> Result:
    """Dialogues of ChatIR: Hits@10 by round, the image of a dialogue among a pool.

    Args:
        annotations: dialogues in ChatIR's JSON, such as VisDial_v1.0_queries_val.json
        gallery: Search_Space_val_50k.json, the images that are searched
    """
    from fromage.evals.chatir import evaluate, read_chats

    return run.judged(lambda: read_chats(annotations, gallery, run.images, run.limit), evaluate)


def few_shot(*, world: Path, shots: Sequence[int] = (0, 1, 2, 4), run: EvalOptions) -> Result:
    """Learning from examples in the prompt, on the toy world.

    Args:
        world: folder of `fromage toy make`
        shots: numbers of examples in front of a question
    """
    from fromage.evals.few_shot import evaluate, read_world

    data = read_world(world, run.limit)
    return run.told(evaluate(run.model(), data, shots=shots))


def refcoco(
    refs: Path, *, instances: Path, split: Sequence[Split] = ("val",), question: str = QUESTION, match: str | None = None,
    run: OctopusOptions,
) -> Result:  # fmt: skip
    """Octopus: referring expressions of RefCOCO, RefCOCO+ or RefCOCOg, the object meant among all.

    Args:
        refs: refs(unc).p, refs(google).p or refs(umd).p
        instances: instances.json that came with it
        split: one or several of val, testA, testB, test and train, of which a file has some
        match: evaluate only expressions that match this regular expression, such as '(left|right)'
    """
    from fromage.evals.refcoco import evaluate
    from fromage.octopus.sources import RefCOCO

    named = str(refs), str(instances), str(run.images)
    sources = [RefCOCO(*named, split=each, question=question, match=match, limit=run.limit) for each in dict.fromkeys(split)]
    return run.point(evaluate, sources, masks=True)


def pope(files: Sequence[Path], *, run: OctopusOptions) -> Result:
    """Octopus: questions of POPE, whether something is in an image; of several files also the mean F1.

    Args:
        files: coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, or one of them
    """
    from fromage.evals.pope import evaluate
    from fromage.octopus.sources import Pope

    return run.point(evaluate, [Pope(str(file), str(run.images), limit=run.limit) for file in files])


def instructions(file: Path, *, padded: bool = False, run: OctopusOptions) -> Result:
    """Octopus: instructions of LLaVA's kind, answers that point at several objects among them.

    Args:
        file: JSON of LLaVA's instructions
        padded: boxes are shares of the image padded to a square
    """
    from fromage.evals.instructions import evaluate
    from fromage.octopus.sources import Instructions

    data = Instructions(str(file), str(run.images), padded=padded, limit=run.limit)
    return run.point(lambda model, _, options: evaluate(model, data, options), [data])


def spotting(
    folder: Path, *, split: str = "test", question: str = "Describe the image with positions.", run: OctopusOptions,
) -> Result:  # fmt: skip
    """Octopus: captions with boxes, of Flickr30k Entities.

    Args:
        folder: folder with Sentences, Annotations, train.txt, val.txt and test.txt
        split: train, val or test
        question: what is asked of every image
    """
    from fromage.evals.instructions import evaluate
    from fromage.octopus.sources import Flickr30kSpotting

    data = Flickr30kSpotting(str(folder), str(run.images), split=split, instruction=question, limit=run.limit)
    return run.point(lambda model, _, options: evaluate(model, data, options), [data])


def answers(
    questions: Path, *, answers_file: Path, annotations: Path | None = None, model_id: str | None = None,
    max_new_tokens: int = 128, overwrite: bool = False, run: ImageOptions,
) -> Result:  # fmt: skip
    """Octopus or FROMAGe: answers to questions about images, in a file for the official scorers of VQAv2, GQA and others.

    A run that was killed goes on where it stopped; --overwrite begins again, and replaces the file.

    Args:
        questions: lines of JSON {question_id, image, text} as in LLaVA's evaluations, or ScienceQA's JSON
        answers_file: lines of JSON {question_id, prompt, text, answer_id, model_id, metadata}, as LLaVA writes them
        annotations: v2_mscoco_val2014_annotations.json or another of VQA's form, for VQA accuracy
        model_id: name of the model in the answers file (default: its kind and fingerprint)
    """
    from fromage.cli.models import load_any
    from fromage.evals.answers import evaluate
    from fromage.evals.questions import read_questions
    from fromage.evals.vqa import read_vqa

    data = read_questions(questions, run.images, run.limit)
    said = read_vqa(annotations) if annotations else None
    model = load_any(run.ckpt, run.device, quantize=run.quantize)
    return run.told(evaluate(model, data, answers_file, run.options(), max_new_tokens, said, model_id, overwrite))


def mteb(
    *, ckpt: str, tasks: Sequence[str], batch_size: int = 64, device: str = "auto", quantize: AsLoaded | None = None
) -> Result:
    """Run tasks of mteb and MIEB over texts and images, by their own runner.

    Args:
        tasks: name of a task, such as Flickr30kT2IRetrieval; repeat it for several. Its data comes from the hub
    """
    from tabulate import tabulate

    from fromage.interop.mteb import evaluate, find_tasks
    from fromage.models.fromage import load_model

    found = find_tasks(tasks)
    report = evaluate(load_model(ckpt, device, quantize=quantize), found, batch_size)
    return Result(tabulate(report["table"]["rows"], report["table"]["head"], "github", floatfmt=".4f"), report)
