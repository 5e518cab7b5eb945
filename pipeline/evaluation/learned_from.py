"""Whether a student learned from the images of a test."""

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced
from pipeline.data import ImageFile, Images, image_digest
from pipeline.evaluation.context import Answer
from pipeline.storage import is_remote
from pipeline.training.run_directory import DistillResult, TeacherLink
from singer.errors import UserError

# So many images of --test are looked up among the images that the student learned from.
_LOOKED_FOR = 256


def learned_from(run: DistillResult, test: Images) -> tuple[Answer, str]:
    """Return whether the caches that a run learned from hold any of a sample of test images.

    A fine-tuned run learned from test images, too, if it was fine-tuned on one of the files that hold them. If the
    answer is unknown, the second value is the reason. All caches of a run hold the same images, so that one of them is
    enough.
    """
    if run.finetuned is not None and {str(path) for path in test.given} & set(run.finetuned.sources):
        return "yes", ""
    reasons = []
    for link in run.teachers:
        known = _cached_images(link)
        if isinstance(known, str):
            reasons.append(known)
            continue
        with ImageFile(test) as files:
            looked_for = evenly_spaced(np.arange(len(test)), _LOOKED_FOR)
            digests = np.array([image_digest(files.encoded(n)[0]) for n in looked_for.tolist()], dtype=np.uint64)
        return ("yes" if np.isin(digests, known).any() else "no"), ""
    return "unknown", "; ".join(dict.fromkeys(reasons))


def _cached_images(link: TeacherLink) -> np.ndarray | str:
    """Return the digests of the images that a cache holds, or the reason why they are unknown."""
    place = link.cache_place
    if is_remote(place):
        return f"its cache {place} is not on this machine"
    try:
        cache = Cache(place, known=link.cache)
    except (UserError, OSError) as error:  # the cache was moved, deleted or damaged
        return f"its cache cannot be read: {error}"
    if link.cache not in cache.ids:
        return f"there is another cache at {place} now"
    return cache.index.digest
