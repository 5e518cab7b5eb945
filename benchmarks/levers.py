"""Each lever alone: one change of the recipe at a time, at equal steps, judged on training images, ranked.

    python benchmarks/levers.py --teacher FILE --data FOLDER --out runs/levers [--levers NAME ...] [--seeds 0 1 2]
        [--passes 16] [--shards 5] [--set KEY=VALUE ...] [--figures FILE] [--write docs/results.md] [--table]

A student of the recipe tinyimagenet-ti-to-w96 with one change (LEVERS) sees each image of all training shards but the
last `--passes` times. Probes of images are tested on the last training shard; that of CamVid learns from all its
training shards but the last, which tests it. So nothing here reads a test image. The cost of a step is the processor
time of an image over that of the recipe, measured in turn. Bytes are those of a record of the blocks that are compared.
FILE and FOLDER are those of benchmarks/results.py. All figures are kept in a file of JSON lines, as in
benchmarks/field.py: if the command is repeated, it continues where it stopped. --table only prints what there is.
"""

import json
import statistics
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from equal_time import processor_seconds
from field import Steps
from kept_figures import Figures
from results import write_between
from setting import JUDGED, PROBES, RECIPE, TRAIN, Chain, cell, line, mode

from pipeline.config import Config, load_config
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.refine import refine

BASE = "the recipe"
CROPS = ("views.kind=random-resized-crop", "views.scale=[0.3,1]", "views.flip=0.5")
# {lever: what it changes}. A new one is a line here.
LEVERS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "raw targets": ("refine.cleaner=none", "refine.normaliser=none"),
    "cleaner none, standardize": ("refine.cleaner=none",),
    "cleaner neighbour": ("refine.cleaner=neighbour",),
    "normaliser layernorm-standardize": ("refine.normaliser=layernorm-standardize",),
    "averages over 10 copies": ("teacher.copies=10",),
    "teacher at 192 px": ("teacher.image_size=192", "student.image_size=128"),
    "teacher at 224 px": ("teacher.image_size=224", "student.image_size=128"),
    "student at 64 px, patches of 8": ("student.image_size=64", "student.patch_size=8"),
    "random start": ("student.init=random",),
    "start from even blocks": ("student.init_blocks=even",),
    "LoRA of rank 16": ("student.lora=16",),
    "LoRA of rank 64": ("student.lora=64",),
    "AdamW": ("distill.optimizer=adamw",),
    "all patches": ("distill.token_share=1",),
    "a quarter of the patches": ("distill.token_share=0.25",),
    "no step with all patches": ("distill.whole_share=0",),
    "half of the steps with all patches": ("distill.whole_share=0.5",),
    "40 % masked patches": ("distill.mask_share=0.4",),
    "head linear": ("distill.projector=linear",),
    "head mlp": ("distill.projector=mlp",),
    "exit lift": ("student.exit=lift",),
    "exit wide": ("student.exit=wide",),
    "exit wide, head linear": ("student.exit=wide", "distill.projector=linear"),
    "exit wide, head mlp": ("student.exit=wide", "distill.projector=mlp"),
    "exit wide of 384 channels, head mlp": ("student.exit=wide", "student.exit_width=384", "distill.projector=mlp"),
    "4 registers": ("student.registers=4",),
    "block 11 alone": ("distill.blocks=[11]",),
    "layer decay 0.7": ("distill.layer_decay=0.7",),
    "layer decay 0.5": ("distill.layer_decay=0.5",),
    "average of the weights": ("distill.ema=0.998",),
    "int4": ("cache.codec=int4",),
    "int1": ("cache.codec=int1",),
    "smooth L1": ("distill.objective=smooth-l1",),
    "objective weighted": ("distill.objective=weighted",),
    "objective theia": ("distill.objective=theia",),
    "2 crops": (*CROPS, "views.count=2"),
    "4 crops": (*CROPS, "views.count=4"),
    "8 crops": (*CROPS, "views.count=8"),
    "16 crops": (*CROPS, "views.count=16"),
    "2 crops that teach each other": (*CROPS, "views.count=2", "distill.overlap=other"),
    "2 crops, averages": (*CROPS, "views.count=2", "distill.overlap=average"),
    "4 crops, averages": (*CROPS, "views.count=4", "distill.overlap=average"),
}
TOKENS = {"cls": "CLS", "mean_patch": "mean patch"}
_STORED = ("teacher.", "cache.", "views.")


@dataclass(frozen=True, eq=False)
class Levers:
    """The chain with one change at a time."""

    chain: Chain
    passes: int
    kept: Figures

    def config(self, sets: tuple[str, ...], *more: str) -> Config:
        """Return the recipe with a change; an epoch is a pass over all views, and the warm-up is as long in steps."""
        views, warmup = self.chain.config(*sets).views.count, self.chain.config().distill.warmup_epochs
        equal = [f"distill.epochs={self.passes // views}", f"distill.warmup_epochs={warmup / views}"]
        return self.chain.config(*equal, *sets, *more)

    @lru_cache  # noqa: B019 - there is one chain
    def inputs(self, sets: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
        """Return the cache and the refiner of a lever, after making them; those that do not differ are shared."""
        stored = [s for s in sets if s.startswith(_STORED)]
        refined = [s for s in sets if s.startswith("refine.")]
        folder, refiner = (
            self.chain.out / f"{n}-{_slug(s)}" for n, s in (("cache", stored), ("refiner", stored + refined))
        )
        config, shards = self.config(sets), self.chain.images(TRAIN)
        cache_teacher(config, shards[:-1], folder, mode(folder))
        refine(config, folder, refiner, mode(refiner))
        return [folder], [refiner]

    @cached_property
    def base(self) -> "Costed":
        """Return the steps of the recipe, with which the others are compared."""
        return Costed(self, ())

    def cost(self, name: str) -> dict[str, float]:
        """Return {"ratio": of the processor time of an image to the recipe's, "bytes": of a record}."""
        return self.kept.get(f"cost of {name}", lambda: self.measured(LEVERS[name]))

    def measured(self, sets: tuple[str, ...]) -> dict[str, float]:
        """Measure `cost`: medians of interleaved rounds of a few batches."""
        steps, ratios = Costed(self, sets), []
        for turn in range(6):
            own, base = steps.seconds(), self.base.seconds()
            if turn:  # the first round warms up
                ratios.append(own / base)
        return {"ratio": statistics.median(ratios), "bytes": steps.steps.bytes}

    def figures(self, name: str, seed: int) -> list[float]:
        """Return JUDGED and CamVid's mIoU (%) of a lever and a seed, after training the student."""
        kept = self.kept.get(f"{name}, seed {seed}", lambda: {"figures": self.trained(name, seed)})
        found: list[float] = kept["figures"]
        return found

    def trained(self, name: str, seed: int) -> list[float]:
        """Train a student, or the rest of it, and probe it."""
        sets, run = LEVERS[name], f"run-{self.passes}-{_slug([name])}-{seed}"
        config, (caches, refiners) = self.config(sets, f"distill.seed={seed}"), self.inputs(sets)
        if not (self.chain.out / run / RUN_RESULT).exists():
            distill(config, caches, self.chain.out / run, refiners, mode=mode(self.chain.out / run))
        *most, last = self.chain.images("camvid-train")
        probed = evaluate(load_config(RECIPE, PROBES), self.chain.out / run, most, last, "segmentation")
        return [*self.chain.judged(run, config, caches[0], refiners[0]), vars(probed)["miou"]]

    def row(self, name: str, seeds: list[int]) -> list[str]:
        """Return the cells of a lever."""
        cost, found = self.cost(name), [self.figures(name, seed) for seed in seeds]
        cells = [cell(values) for values in map(list, zip(*found, strict=True))]
        return [name, *cells, f"{cost['ratio']:.2f}", f"{cost['bytes'] / 1000:.1f}", str(len(seeds))]

    def table(self, seeds: list[int]) -> str:
        """Return the table of what is done, the best first by the mean of the four probes of images."""
        probes = [f"{probe.replace('knn', 'k-NN')}, {TOKENS[tokens]}" for probe, tokens in JUDGED]
        head = ["change", *probes, "CamVid mIoU", "cost of a step", "kB a record", "seeds"]
        rows = []
        for name in LEVERS:
            done = [seed for seed in seeds if f"{name}, seed {seed}" in self.kept.known]
            if done and f"cost of {name}" in self.kept.known:
                rows.append(self.row(name, done))
        rows.sort(key=lambda cells: -sum(float(value.split()[0]) for value in cells[1 : 1 + len(JUDGED)]))
        return "\n".join(map(line, [head, ["---"] * len(head), *rows]))


class Costed:
    """Steps of a lever, at the shares of the patches that its student sees."""

    def __init__(self, levers: Levers, sets: tuple[str, ...]) -> None:
        self.settings, self.steps = levers.config(sets).distill, Steps(levers.config(sets), *levers.inputs(sets))

    def seconds(self) -> float:
        """Return the processor time of an image, the mean over a training."""
        shares = {self.steps.new.distiller.share: 1 - self.settings.whole_share, 1.0: self.settings.whole_share}
        dropout, total = self.steps.new.distiller.dropout, 0.0
        for share, part in shares.items() if dropout is not None else [(1.0, 1.0)]:
            if dropout is not None:
                dropout.share = share
            total += part * processor_seconds(self.steps.run) / self.steps.images
        return total


def _slug(sets: list[str]) -> str:
    """Return a name for a folder."""
    return "".join(c if c.isalnum() else "-" for c in "-".join(sets)) or "recipe"


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = Chain.parser(__doc__)
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--passes", type=int, default=16, help="times that a student sees an image")
    parser.add_argument("--figures", type=Path, help="file of all figures; default: figures.jsonl in --out")
    parser.add_argument("--table", action="store_true", help="print the table of what is done, and do nothing")
    parser.add_argument("--write", type=Path, help="a document in which the table goes between the marks")
    options = parser.parse_args()
    views = [int(s.partition("=")[2]) for name in options.levers for s in LEVERS[name] if s.startswith("views.count=")]
    if any(options.passes % count for count in views):
        parser.error(
            f"--passes {options.passes} is no multiple of {max(views)} views; give such a number, or other --levers"
        )
    chain = Chain.of(options)
    setting = {"passes": options.passes, "shards": options.shards} | ({"set": options.set} if options.set else {})
    kept = Figures(options.figures or options.out / "figures.jsonl", setting)
    levers = Levers(chain, options.passes, kept)
    if not options.table:
        for seed in options.seeds:
            for name in options.levers:
                figures = levers.figures(name, seed)
                print(
                    f"{name}, seed {seed}: {json.dumps([round(x, 1) for x in figures])} {levers.cost(name)}", flush=True
                )
    print(levers.table(options.seeds))
    if options.write:
        write_between(options.write, levers.table(options.seeds), "levers")


if __name__ == "__main__":
    main()
