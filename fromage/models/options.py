"""What an option of a model may be. Without PyTorch, since the command line reads it for --help."""

from __future__ import annotations

from typing import Literal, get_args

Quantized = Literal["int8", "nf4"]  # number type that the language model's layers are held in
AsLoaded = Literal["int8", "nf4", "none"]  # as Quantized, of a checkpoint; none undoes what it was trained with
Pooling = Literal["ret", "last"]  # which hidden state embeds a text: the one at [RET], or at its last word (an ablation)
RetAttention = Literal["sequential", "stacked"]  # what r > 1 [RET] tokens see: their predecessors, or not one another
RetFusion = Literal["mean", "transformer", "first"]  # how their states become one embedding (fromage.models.fusion)
Start = Literal["after_images", "first"]  # where the start token stands: after leading images, or before them
Space = Literal["learned", "clip"]  # where images and texts are compared: q numbers of our own, or CLIP's joint space

CHOICES: dict[str, tuple[str, ...]] = {  # by argument of Fromage
    "pooling": get_args(Pooling),
    "ret_attention": get_args(RetAttention),
    "ret_fusion": get_args(RetFusion),
    "space": get_args(Space),
    "start": get_args(Start),
}
