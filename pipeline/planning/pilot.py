"""A small cache that a plan makes by the real stage, and to which it appends."""

from pathlib import Path

from pipeline.cache.extract import CALIBRATION_RECORDS
from pipeline.config import Config
from pipeline.planning.rates import REPEATS, Rate
from pipeline.planning.sample import Sample
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.storage import Place, open_store

MOST_IMAGES = 20_000


class Pilot:
    """A small cache, made by the real stage; place: where it is; work: a local folder for everything else."""

    def __init__(self, config: Config, sample: Sample, place: Place, work: Path) -> None:
        # The sample's tars hold KEY.jpg, whatever is in a key. Each of the short runs would compile the teacher anew.
        config = config.changed(data={"image_key": ".jpg"}, cache={"compile": False})
        self.config, self.place, self.work, self._sample = config, place, work, sample
        count = min(len(sample.images), -(-CALIBRATION_RECORDS // config.views.count))
        sample.write_tar(work / "0.tar", range(count))
        self.first = cache_teacher(config, str(work / "0.tar"), place)

    def sizes(self) -> dict[str, int]:
        """Return {file: bytes} of the cache."""
        return open_store(self.place).sizes()

    def grow(self, expected: float, seconds: float, most: int) -> Rate:
        """Append to the cache in three runs, each for a third of the seconds; return the records a second.

        The runs do not repeat the calibration, so this is the rate of a long run. expected: records a second, from
        which the number of records is estimated; most: the limit of images in a run.
        """
        config, images = self.config, len(self._sample.images)
        batch = config.cache.views_at_once
        records = max(batch, int(expected * seconds / REPEATS) // batch * batch)
        count = max(1, min(most, MOST_IMAGES, -(-records // config.views.count)))
        repeats = []
        for run in range(1, REPEATS + 1):
            start = run * count
            numbers = [n % images for n in range(start, start + count)]
            tar = self.work / f"{run}.tar"
            self._sample.write_tar(tar, numbers, f"{run}/")
            result = cache_teacher(config, str(tar), self.place, "append")
            repeats.append((result.images_per_second * result.seconds, result.seconds))
        return Rate.of(repeats)
