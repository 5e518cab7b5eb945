"""Score the images of a cache by the teacher's features, so that the share that is trained on can be chosen.

Nothing needs labels or a student: the first view of every image is read once. A high score is a hard image.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import batches, spread
from singer.errors import UserError

# More clusters than this, or clusters of fewer images, would be of single images.
_MOST_CLUSTERS, _IMAGES_OF_A_CLUSTER = 100, 10
# The means of clusters need no more images than these.
_CLUSTERED = 20_000


def image_scores(cache: Cache, by: str, seed: int) -> np.ndarray:
    """Return a score for every image, (images,), in the order of np.unique(cache.index.image).

    by: a name among SCORES. Raises UserError if the cache has not what the score needs.
    """
    last = Cache(cache.place, cache.manifest.teacher.variant)
    last = Cache(cache.place, cache.manifest.teacher.variant, [last.blocks[-1]])
    _, first = np.unique(last.index.image, return_index=True)
    return SCORES[by](last, first, seed).double().numpy()


def el2n(cache: Cache, records: np.ndarray, seed: int) -> Tensor:
    """Return how unsure the teacher is, (n,): EL2N (Paul et al., arXiv 2107.07075) with its own verdict as the label.

    That is the L2 norm of its class probabilities minus the one-hot vector of the largest one.
    """
    (block,), suffix = cache.blocks, cache.suffix()
    if not suffix.is_last(block) or not getattr(suffix.model, "num_classes", 0):
        raise UserError(
            "distill.share_by el2n needs the teacher's last block in the cache, and a head on it; take prototypes"
        )
    if cache.manifest.sampled and suffix.model.global_pool != "token":
        raise UserError("distill.share_by el2n: the teacher's head reads all patches, and the cache holds some of them")
    scores = []
    for features in batches(cache, records, torch.device("cpu")):
        found = suffix.logits(features[block].float(), block).softmax(-1)
        scores.append((found - F.one_hot(found.argmax(-1), found.shape[-1])).norm(dim=-1))
    return torch.cat(scores)


def prototype_distance(cache: Cache, records: np.ndarray, seed: int) -> Tensor:
    """Return the distance of images, (n,), from the nearest k-means centre (Sorscher et al., arXiv 2206.14486).

    It is 1 - the cosine, of CLS (without CLS, of the mean patch) of the last cached block.
    """
    from scipy.cluster.vq import kmeans2  # few runs need to wait for this import

    (block,), teacher = cache.blocks, cache.manifest.teacher
    parts = [
        x[block][:, 0] if teacher.class_token else x[block][:, teacher.prefix_tokens :].mean(1)
        for x in batches(cache, records, torch.device("cpu"))
    ]
    features = F.normalize(torch.cat(parts).float(), dim=-1)
    clusters = max(1, min(_MOST_CLUSTERS, len(features) // _IMAGES_OF_A_CLUSTER))
    chosen = features[torch.from_numpy(spread(np.arange(len(features)), _CLUSTERED))]
    centres, _ = kmeans2(chosen.numpy(), clusters, minit="++", missing="warn", seed=np.random.default_rng(seed))
    found: Tensor = 1 - (features @ F.normalize(torch.from_numpy(centres).float(), dim=-1).T).amax(-1)
    return found


SCORES: dict[str, Callable[[Cache, np.ndarray, int], Tensor]] = {"el2n": el2n, "prototypes": prototype_distance}
