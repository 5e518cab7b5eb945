"""Models of timm without the values of their tensors: what one is, and which ones fit some weights."""

import difflib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import timm
import torch

from pipeline.models.weights import describe_size
from singer.backbones import depth, gives_tokens
from singer.suffix import outline

# What timm calls ViTs of a width, and how many such models are looked at for a hint: each takes a tenth of a second.
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1408: "giant"}
_MOST_TRIED = 8


def outline_of(name: str, args: Mapping[str, Any]) -> Any:
    """Build a model of timm without the values of its tensors, which takes no memory."""
    return _known_outline(name, json.dumps(args))


@lru_cache(maxsize=4)
def _known_outline(name: str, args: str) -> Any:
    return outline(name, json.loads(args))


def fitting_models(name: str, state: Mapping[str, torch.Tensor]) -> str:
    """Return a hint that names models of the same family with the width, depth and patch size of some weights."""
    size, family = describe_size(state), name.partition(".")[0]
    if size is None or not timm.is_model(family):
        return ""
    width, blocks, patch = size
    near = sorted(
        timm.list_models(f"*{_SIZES.get(width, '')}*patch{patch}*"),
        key=lambda other: -difflib.SequenceMatcher(None, family, other).ratio(),
    )
    found = []
    for other in near[:_MOST_TRIED]:
        model = outline_of(other, {})
        if gives_tokens(model) and (getattr(model, "embed_dim", None), depth(model)) == (width, blocks):
            found.append(other)
    like = f", as {', '.join(found[:3])}" if found else ""
    return f"; they are {width} wide and have {blocks} blocks and patches of {patch} pixels{like}"
