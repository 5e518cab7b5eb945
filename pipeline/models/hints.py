"""Find the model of timm that was meant, by the names that torch.hub, Hugging Face, OpenCLIP and torchvision use.

A name is taken apart into words that mean the same in all of them (`dinov2_vitb14` is dinov2, vit, base, patch14), and
the nearest model is the one that shares the most words, where rare words count more.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

import timm

_SIZES = {"ti": "tiny", "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}
_SIZES |= {"bigg": "gigantic", "7b": "7b", "m": "medium"}
# A size in one letter, its patch size, and whether it is the larger one: vitb14, l16, s16plus.
_SHORT = re.compile(r"(vit)?(ti|[tsblhg]|7b)(8|14|16|32)(plus)?")
_VIT = re.compile(r"vit(ti|[tsblhg]|7b)")
_OWN_VERSION = re.compile(r"(siglip|radio|c?radiov)(\d)")
_PATCH = ("4", "8", "14", "16", "32")
_REGISTERS = re.compile(r"reg\d?|registers?")
# CLIP is what OpenAI and OpenCLIP call so: ViT-B/32, ViT-L-14-336.
_CLIP = re.compile(r"ViT-[A-Za-z0-9]+[-/]\d+(@?[-\d]\w*)?")
# Words that say nothing about the model.
_EMPTY = {"with", "pretrain", "pretrained", "model", "facebook", "google", "timm", "patch", "patch4"}
_EMPTY |= {"window7", "window8", "webli"}
# Words that others divide in another way than timm.
_DIVIDED = {"swin_v2": "swinv2", "sam_vit": "samvit", "sam-vit": "samvit", "convnext_v2": "convnextv2"}
# Below this similarity, 0 to 1, no model was meant. Words this similar, and not shorter, are one with a mistake.
_LEAST, _ONE_WORD, _LONG = 0.35, 0.75, 4


def nearest_model(name: str) -> str | None:
    """Return the name of the model of timm that was most likely meant, or None if none is near."""
    words, weights = _vocabulary()
    asked = {near for word in _words(name) for near in _known(word, weights)}

    def norm(some: Iterable[str]) -> float:
        return math.sqrt(sum(weights[word] ** 2 for word in some))

    shared = {model: asked & own for model, own in words.items() if asked & own}
    # The cosine of two sets of weighted words.
    likeness = {model: norm(both) ** 2 / norm(asked) / norm(words[model]) for model, both in shared.items()}
    most = max(likeness.values(), default=0.0)
    nearest = [model for model, value in likeness.items() if value > most - 1e-9]
    spelled = difflib.get_close_matches(name, nearest, n=1, cutoff=0)
    return spelled[0] if most >= _LEAST else None


@cache
def _vocabulary() -> tuple[dict[str, set[str]], dict[str, float]]:
    """Return the words of every name of timm, and the weight of every word."""
    words = {model: _words(model) for model in [*timm.list_models(), *timm.list_pretrained()]}
    counts = Counter(word for some in words.values() for word in some)
    return words, {word: math.log(len(words) / count) + 0.1 for word, count in counts.items()}


def _known(word: str, known: Iterable[str]) -> list[str]:
    """Return the word of timm's names that a word is, but for a mistake in writing; none for others."""
    if word in known:
        return [word]
    return difflib.get_close_matches(word, known, n=1, cutoff=_ONE_WORD) if len(word) >= _LONG else []


def _words(name: str) -> set[str]:
    """Return the words of a model's name."""
    found = ["clip"] if _CLIP.fullmatch(name) else []
    text = name.lower()
    for theirs, ours in _DIVIDED.items():
        text = text.replace(theirs, ours)
    for word in re.split(r"[^a-z0-9]+", text):
        if match := _SHORT.fullmatch(word):
            found += ["vit", _SIZES[match[2]], f"patch{match[3]}", *(["plus"] if match[4] else [])]
        elif match := _VIT.fullmatch(word):
            found += ["vit", _SIZES[match[1]]]
        elif match := _OWN_VERSION.fullmatch(word):
            found += [match[1].removeprefix("c").removesuffix("v"), f"v{match[2]}"]
        elif _REGISTERS.fullmatch(word):
            found.append("reg")
        elif word in _PATCH:
            found.append(f"patch{word}")
        elif word not in _EMPTY:
            found.append(_SIZES.get(word, word))
    return {word for word in found if word}
