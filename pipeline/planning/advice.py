"""Which views and codec a cache should have, for the passes that a student makes and the disk that there is."""

from collections.abc import Sequence

from pipeline.planning.cache_size import PlanOption
from pipeline.planning.choice import CROPS_FROM, LADDER, VIEWS


def advice(passes: int, options: Sequence[PlanOption]) -> str | None:
    """Return a sentence: how many views to store, in which codec.

    passes: over the images, epochs times views. options: of a cache, some of them with all tokens. Few bits are better
    than few views, since students hardly notice them (docs/results.md). None if the disk is not known.
    """
    most = {o.codec: o.max_views for o in options if o.token_share == 1 and o.max_views is not None}
    # Features that exceed the range of all these need bfloat16.
    codecs = [codec for codec in LADDER if codec in most] or [*most]
    if not codecs:
        return None
    wanted = VIEWS if passes >= CROPS_FROM else (1,)
    views = next((n for n in wanted if n <= most[codecs[-1]]), 0)
    if not views:
        return (
            f"one view of each image in {codecs[-1]} is larger than the free disk; take fewer images or blocks, or "
            "cache.token_share=0.5"
        )
    codec = next(codec for codec in codecs if most[codec] >= views)
    kind = "the centre view" if views == 1 else f"{views} random crops"
    epochs = max(1, passes // views)
    why = (
        f"a student makes {passes} passes over the images (distill.epochs={epochs}), and crops pay from {CROPS_FROM} on"
    )
    return f"{kind} of each image in {codec}: {why}" + ("; more views do not fit" if views < wanted[0] else "")
