"""Checks of the options of FromageModule, before a tower is loaded."""

from __future__ import annotations

from math import inf
from typing import Any

from fromage.checks import check_real, check_whole
from fromage.errors import UserError

COMPOSITION = ("composition_captioning_weight", "composition_retrieval_weight")


def check(h: Any) -> None:
    """Raise UserError for options that are not of their range, or contradict one another."""
    for name, least in {"warmup_steps": 0, "decay_steps": 0, "shown": 0}.items():
        check_whole(f"model.{name}", h[name], least)
    weights = ("captioning_weight", "retrieval_weight", *COMPOSITION)
    shares = {"pairing": 1, "image_dropout": 0.99, "captioned_share": 1}
    for name, most in {"lr": inf, "eps": inf, **shares, **dict.fromkeys(weights, inf)}.items():
        check_real(f"model.{name}", h[name], 0, most)
    if not h.captioned_share:
        raise UserError("model.captioned_share 0: choose more; model.captioning_weight 0 leaves captioning out")
    if h.image_dropout and h.space == "clip":
        raise UserError("model.image_dropout: with model.space clip the image head is frozen; leave it out")
    for beta in h.betas:
        check_real("model.betas", beta, 0, 1)
    if not any(h[name] for name in weights):
        raise UserError("model.captioning_weight, model.retrieval_weight: choose numbers from 0 on, not all of them 0")
    if h.step not in ("fast", "reference"):
        raise UserError(f"model.step {h.step}: choose fast or reference")
    if h.chunk < 0:
        raise UserError(f"model.chunk {h.chunk}: choose a number of examples, or 0 for all at once")
    if h.chunk and h.step == "reference":
        raise UserError("model.chunk is the fast step's: leave out model.chunk, or choose model.step fast")
