"""Score the images of a cache by the teacher's features, so that the share that is trained on can be chosen.

Nothing needs labels or a student (student_scores has that of a student), and only the first view of every image is
read. A high score is a hard image.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import batches, evenly_spaced, first_views, last_block
from pipeline.runtime.progress import meter
from singer.errors import UserError
from singer.suffix import TeacherSuffix
from singer.tokens import global_tokens

# More clusters than this, or clusters of fewer images, would be of single images.
_MOST_CLUSTERS, _IMAGES_OF_A_CLUSTER = 100, 10
# The means of clusters need no more images than these.
_CLUSTERED = 20_000


def check_scores(cache: Cache, by: str) -> None:
    """Raise UserError if a cache has not what a score needs; by: a name among SCORES."""
    if by == "el2n":
        _check_head(last_block(cache.place, cache.manifest.teacher.variant))


def image_scores(cache: Cache, by: str, seed: int) -> np.ndarray:
    """Return a score for every image, (images,), in the order of np.unique(cache.index.image).

    by: a name among SCORES. Raises UserError if the cache has not what the score needs.
    """
    last = last_block(cache.place, cache.manifest.teacher.variant)
    return SCORES[by](last, first_views(last), seed).double().numpy()


def el2n(cache: Cache, records: np.ndarray, seed: int) -> Tensor:
    """Return how unsure the teacher is, (n,): EL2N (Paul et al., arXiv 2107.07075) with its own class as the label.

    That is the L2 norm of its class probabilities minus the one-hot vector of the largest one.
    """
    suffix, block = _check_head(cache), cache.blocks[0]
    scores = []
    for tokens in _read(cache, records):
        found = suffix.logits(tokens.float(), block).softmax(-1)
        scores.append((found - F.one_hot(found.argmax(-1), found.shape[-1])).norm(dim=-1))
    return torch.cat(scores)


def prototype_distance(cache: Cache, records: np.ndarray, seed: int) -> Tensor:
    """Return the distance of images, (n,), from the nearest k-means centre (Sorscher et al., arXiv 2206.14486).

    It is 1 - the cosine, of CLS (without CLS, of the mean patch) of the last cached block. The images are read twice:
    some of them for the centres, and all for their distances.
    """
    from scipy.cluster.vq import kmeans2  # few runs need to wait for this import

    teacher = cache.manifest.teacher

    def features(part: np.ndarray) -> Iterator[Tensor]:
        for tokens in _read(cache, part):
            yield F.normalize(global_tokens(tokens, teacher.prefix_tokens, teacher.class_token).float(), dim=-1)

    chosen = torch.cat(list(features(evenly_spaced(records, _CLUSTERED)))).numpy()
    clusters = max(1, min(_MOST_CLUSTERS, len(chosen) // _IMAGES_OF_A_CLUSTER))
    centres, _ = kmeans2(chosen, clusters, minit="++", missing="warn", seed=np.random.default_rng(seed))
    directions = F.normalize(torch.from_numpy(centres).float(), dim=-1)
    return torch.cat([1 - (x @ directions.T).amax(-1) for x in features(records)])


def _check_head(cache: Cache) -> TeacherSuffix:
    """Return the suffix, with a head, after the only block of a cache. Raises UserError if it cannot be used."""
    (block,), suffix = cache.blocks, cache.suffix()
    if not suffix.is_last(block) or not getattr(suffix.model, "num_classes", 0):
        raise UserError(
            "distill.share_by el2n needs the teacher's last block in the cache, and a head on it; take prototypes"
        )
    if cache.manifest.sampled and suffix.model.global_pool != "token":
        raise UserError("distill.share_by el2n: the teacher's head reads all patches, and the cache holds some of them")
    return suffix


def _read(cache: Cache, records: np.ndarray) -> Iterator[Tensor]:
    """Yield the tokens (n, N, d) of records of the only block of a cache, batch by batch, and show progress."""
    with meter("score images", len(records), "images") as m:
        for features in batches(cache, records, torch.device("cpu")):
            (tokens,) = features.values()
            yield tokens
            m.advance(len(tokens))


SCORES: dict[str, Callable[[Cache, np.ndarray, int], Tensor]] = {"el2n": el2n, "prototypes": prototype_distance}
