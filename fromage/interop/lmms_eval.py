"""FROMAGe under lmms-eval: its tasks of images and text in, text out, such as POPE, VQAv2, GQA, NoCaps and Flickr30k.

    python -m lmms_eval --model fromage --model_args pretrained=FOLDER --tasks pope --batch_size 16

Answers are text alone: no image is retrieved, and [RET] is barred.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from fromage.checks import check_whole
from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.generation.preset import read_preset
from fromage.generation.score import score
from fromage.generation.styles import find_style
from fromage.models.fromage import load_model
from fromage.models.prompts import Part, prompt_length

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise UserError(f"this needs lmms-eval 0.7 or newer ({error.name}): {pip_install('lmms-eval')}") from error

PLACE = "<image>"  # where a context says that an image stands
LENGTH = 128  # tokens of an answer at most, where a task does not say


class FromageLmms(lmms):
    """The model `fromage` of lmms-eval. A request's images stand in front of its text, or at each <image> in it."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        style: str | None = None,
        system: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a model.

        Args:
            pretrained: checkpoint, folder or hub name.
            style: prompt style; None: as the model's generation.json says, else by its chat template, else dialogue.
            system: text in front of everything.
            device: None for the first there of cuda, mps and cpu.
            dtype: dtype of the towers (overrides the one of training).
            batch_size: requests answered together; max_batch_size, its bound where lmms-eval seeks it, is not used.
        """
        super().__init__()
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise UserError(f"batch_size {batch_size}: give a number; it is not sought") from None
        check_whole("batch_size", self.batch_size, 1)
        self.model = load_model(pretrained, device or "auto", dtype=dtype)
        self.preset = read_preset(self.model.generation).over(style, system)
        self.style = find_style(self.preset.style, self.model)

    @property
    def device(self) -> Any:
        """The model's."""
        return self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests of (context, options, doc_to_visual, doc_id, task, split), in their order.

        Requests with the same options are answered together. An answer is cut to what the language model has positions for
        after its prompt; where there are none it is '', with a warning. Raises UserError for options that mean something
        else than greedy decoding or sampling, and for what is no image.
        """
        groups: dict[Decoding, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[self._decoding(request.args[1])].append(number)
        said = [""] * len(requests)
        for decoding, numbers in groups.items():
            for start in range(0, len(numbers), self.batch_size):
                some = numbers[start : start + self.batch_size]
                for i, text in zip(some, self._answers([requests[i].args for i in some], decoding), strict=True):
                    said[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args[:2], text)
        return said

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For (context, continuation or doc_to_target, doc_to_visual, doc_id, task, split): nats, and whether it is greedy.

        The continuations of one prompt are scored together. A continuation is greedy where greedy decoding of text alone
        begins with its tokens.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers in self._same_prompt(requests):
            wanted = [self._continuation(requests[i].args) for i in numbers]
            rows = [self.model.tokenizer.encode(text) for text in wanted]
            decoding = Decoding(max(map(len, rows)), max_images=0)
            prompt = self._prompt(requests[numbers[0]].args)
            totals = score(self.model, prompt, wanted).total.tolist()
            (greedy,) = generate(self.model, [prompt], decoding)
            for i, row, total in zip(numbers, rows, totals, strict=True):
                found[i] = total, greedy.ids[: len(row)] == row
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises UserError: rounds whose next question depends on the answer are not there."""
        raise UserError("tasks of several rounds are not supported; leave them out of --tasks")

    def _decoding(self, options: Mapping[str, Any]) -> Decoding:
        """How to decode, from a task's generation_kwargs in Hugging Face's words."""
        if (beams := options.get("num_beams") or 1) != 1:
            raise UserError(f"num_beams {beams}: decoding is greedy or sampled; give --gen_kwargs num_beams=1")
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        temperature = float(options.get("temperature") or 0) if options.get("do_sample", True) else 0.0
        sampled: dict[str, Any] = (
            {"top_p": float(options.get("top_p") or 1), "top_k": int(options.get("top_k") or 0)} if temperature else {}
        )
        length = int(options.get("max_new_tokens") or LENGTH)
        stop = tuple(dict.fromkeys((*self.preset.decoding.stop, *self.style.stop, *until)))
        return Decoding(length, temperature=temperature, stop=stop, max_images=0, **sampled)

    def _answers(self, asked: Sequence[Sequence[Any]], decoding: Decoding) -> list[str]:
        """The answers to a few requests; those for whose prompts there is as much room are answered together."""
        prompts = [self._prompt(args) for args in asked]
        groups: dict[int, list[int]] = defaultdict(list)
        for number, prompt in enumerate(prompts):
            groups[self._room(prompt, decoding.max_new_tokens)].append(number)
        if full := groups.pop(0, []):
            tasks = ", ".join(sorted({str(asked[number][4]) for number in full}))
            limit = f"the {self.model.lm.max_length} of the language model"
            warnings.warn(f"{tasks}: {len(full)} prompts leave no room for an answer in {limit}; it is ''", stacklevel=3)
        said = [""] * len(prompts)
        for room, numbers in groups.items():
            some = [prompts[number] for number in numbers]
            answers = generate(self.model, some, replace(decoding, max_new_tokens=room), batch_size=len(some))
            for number, answer in zip(numbers, answers, strict=True):
                said[number] = answer.text
        return said

    def _room(self, prompt: list[Part], wanted: int) -> int:
        """The tokens of an answer for which there are positions after a prompt, wanted at most; 0 where there are none."""
        limit = self.model.lm.max_length
        return wanted if limit is None else max(0, min(wanted, limit - prompt_length(self.model, prompt)))

    def _prompt(self, args: Sequence[Any]) -> list[Part]:
        """The prompt of a request: its images, opened by lmms-eval, and its context in the model's style."""
        context, _, to_visual, doc_id, task, split = args
        images = list(to_visual(self.task_dict[task][split][doc_id]) or ()) if to_visual else []
        if odd := [image for image in images if not isinstance(image, Image.Image)]:
            raise UserError(f"task {task}: shows {type(odd[0]).__name__}; FROMAGe reads images and text alone")
        system = [self.preset.system] if self.preset.system else []
        return self.style.prompt(system, [], list(_placed(context, images)))

    def _continuation(self, args: Sequence[Any]) -> str:
        _, wanted, _, doc_id, task, split = args
        return wanted if isinstance(wanted, str) else str(wanted(self.task_dict[task][split][doc_id]))

    def _same_prompt(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Numbers of the requests with the same context and document."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, _, _, doc_id, task, split = request.args
            groups[context, doc_id, task, split].append(number)
        yield from groups.values()


def _placed(context: str, images: Sequence[Image.Image]) -> Iterator[Part]:
    """Images at the <image> of a context where there is one for each, else in front of it."""
    texts = context.split(PLACE)
    if len(texts) - 1 != len(images):
        yield from images
        yield " ".join(text.strip() for text in texts if text.strip())
        return
    for number, text in enumerate(texts):
        yield from images[number - 1 : number] if number else ()
        if text:
            yield text
