"""What a model is built from: the options of FROMAGe and of Octopus.

A run names them as options of the model (model.k), a checkpoint holds them among its hyperparameters, and a folder of
parameters in config.json. A new option is a field here, and the place where the model uses it. Its default must be what
models without the option did, since older files do not name it.

Without PyTorch, since the command line reads it for --help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from fromage.checks import check_whole
from fromage.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]
AutoDType = Literal["float32", "bfloat16", "float16", "auto"]
Quantized = Literal["int8", "nf4"]  # number type that the language model's layers are held in
AsLoaded = Literal["int8", "nf4", "none"]  # as Quantized, of a checkpoint; none undoes what it was trained with
Pooling = Literal["ret", "last"]
RetAttention = Literal["sequential", "stacked"]
RetFusion = Literal["mean", "transformer", "first"]
Start = Literal["after_images", "first"]
Space = Literal["learned", "clip"]
CAPTION_LENGTH = 32  # tokens of a generated caption, at most


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen towers of a model. Raises UserError for values that are not of their type, or impossible.

    Attributes:
        lm: causal language model: a name on the Hugging Face hub, a folder, or 'toy'.
        vision: vision tower: a name of open_clip, local-dir:FOLDER, hf-hub:ORG/NAME, timm:NAME, hf:NAME, or 'toy'.
        vision_weights: open_clip's tag of the pretrained weights, or a file; a tag is ignored for other names.
        dtype: dtype of the frozen towers: float32, bfloat16, float16, or auto: bfloat16 where this machine multiplies in it,
            and float32 elsewhere.
        random_weights: build the towers without weights, for tests and timing.
        quantize: hold the language model's layers in int8 or nf4 (4 bits); needs the extra [quant].
    """

    LEAST: ClassVar[Mapping[str, int]] = {}  # the least value of whole numbers
    NEEDED: ClassVar[tuple[str, ...]] = ("lm", "vision", "vision_weights", "dtype")  # fields that every file names

    lm: str = "facebook/opt-6.7b"
    vision: str = "ViT-L-14"
    vision_weights: str | None = "openai"
    dtype: AutoDType = "bfloat16"
    random_weights: bool = False
    quantize: Quantized | None = None

    def __post_init__(self) -> None:
        for name, kind in kinds(type(self)).items():
            check_kind(name, getattr(self, name), kind)
        for name, least in self.LEAST.items():
            check_whole(name, getattr(self, name), least)

    @classmethod
    def of_options(cls, **options: Any) -> Self:
        """From the options of a run. Raises UserError, which names an option as the command line does: model.NAME."""
        if unknown := sorted(options.keys() - kinds(cls).keys()):
            raise UserError(f"model.{unknown[0]}: no option of this model; leave it out")
        try:
            return cls(**options)
        except UserError as error:
            raise UserError(f"model.{error}") from None


@dataclass(frozen=True, kw_only=True)
class FromageConfig(ModelConfig):
    """FROMAGe. The defaults are the paper's model.

    Attributes:
        k: input embeddings per image, in tokens.
        q: width of the retrieval space.
        pooling: which hidden state embeds a text: ret, the one at [RET], or last, at its last word. With last the model
            never answers with images.
        r: [RET] tokens at the end of a caption or query, in tokens; the paper's FROMAGe has 1, its successors 4 to 8.
        ret_attention: what they see: sequential, also their predecessors (GILL), or stacked, the context alone, all at one
            position (MCL).
        ret_fusion: how their hidden states become one embedding: mean, transformer (one small layer, then the mean), or
            first, as GILL's retrieval head.
        space: where images and texts are compared: learned, q numbers of the model's own (the paper), or clip, CLIP's joint
            space with its frozen projection of images (MCL); q is then its width.
        start: where the start token stands in a sequence that an image leads: after_images, as in the paper, or first, for
            language models that hardly see what stands at the first place (LLaMA and its like).
        input_prompt: text that captions are generated after, no part of them, such as the released model's "A picture of".
    """

    LEAST: ClassVar[Mapping[str, int]] = {"k": 1, "q": 1, "r": 1}
    NEEDED: ClassVar[tuple[str, ...]] = (*ModelConfig.NEEDED, "k", "q")

    k: int = 1
    q: int = 256
    pooling: Pooling = "ret"
    r: int = 1
    ret_attention: RetAttention = "sequential"
    ret_fusion: RetFusion = "mean"
    space: Space = "learned"
    start: Start = "after_images"
    input_prompt: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling == "last" and self.r > 1:
            raise UserError(f"r {self.r}: with pooling 'last' no text is read at [RET]; use r 1, or pooling 'ret'")

    @property
    def stacked(self) -> bool:
        """Whether several [RET] share one position."""
        return self.ret_attention == "stacked" and self.r > 1

    @property
    def unlike_paper(self) -> dict[str, Any]:
        """The options between the towers that are not the paper's, by name; pooling, k and q aside."""
        aside = {*kinds(ModelConfig), "k", "q", "pooling", "input_prompt"}
        mine = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in aside}
        usual = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in mine.items() if value != usual[name]}


@dataclass(frozen=True, kw_only=True)
class OctopusConfig(ModelConfig):
    """Octopus. The defaults are the paper's model with 336-pixel images.

    Attributes:
        vision_layer: layer of the vision tower at which patches are read; -1 is the last.
        num_queries: number of object queries; 0 for the sequential counterpart, which spells boxes as text.
        split_layer: layers of the language model below the DETR decoder; null for half.
        decoder_width: width of the DETR decoder.
        decoder_layers: layers of the DETR decoder.
        heads: attention heads of the DETR decoder.
        relay: whether the decoder's output replaces the queries in the top layers; false is an ablation.
        template: text around {image}, {instruction} and {queries}; {start} is the start token.
        mask_scale: cells of a mask per patch and side, 2, 4, 8 or 16; 0 for no masks. With masks, those of RefCOCO are read
            (extra [masks]). The head begins again where the checkpoint of `init` has none.
        lora_rank: rank of LoRA adapters in the language model's layers in stage 3 (extra [lora]); 0 trains all of it.
    """

    LEAST: ClassVar[Mapping[str, int]] = {
        "num_queries": 0,
        "decoder_width": 1,
        "decoder_layers": 1,
        "heads": 1,
        "lora_rank": 0,
    }

    lm: str = "lmsys/vicuna-7b-v1.5"
    vision: str = "ViT-L-14-336"
    vision_layer: int = -2
    num_queries: int = 64
    split_layer: int | None = None
    decoder_width: int = 256
    decoder_layers: int = 4
    heads: int = 8
    relay: bool = True
    template: str = "{image}{instruction}{queries}{start}"
    mask_scale: int = 0
    lora_rank: int = 0


def kinds(config: type[ModelConfig]) -> dict[str, Any]:
    """The types of a configuration's fields, by name."""
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config)}


def check_kind(name: str, value: object, kind: Any) -> None:
    """Raise UserError unless a value is of a field's type."""
    if not _fits(value, kind):
        choices = [str(each) for part in (kind, *get_args(kind)) if get_origin(part) is Literal for each in get_args(part)]
        if choices:
            raise UserError(f"{name} {value}: must be {' or '.join(choices)}")
        raise UserError(f"{name} cannot be {value!r}: it is of type {getattr(kind, '__name__', kind)}")


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, (int, float) if kind is float else kind) and not (kind is int and isinstance(value, bool))
