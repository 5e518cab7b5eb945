"""How well scores of untrained students predict trained ones: rank-students beside the students of a budget, trained.

    python benchmarks/student_ranking.py --teacher FILE --data FOLDER --out runs/ranking [--parameters 1000000]
        [--epochs 8] [--shards 5]

FILE and FOLDER are those of benchmarks/results.py. Candidates are the twelve plain ViTs of `singer rank-students`
whose size is within a tenth of that many parameters. All are trained by the method mse of benchmarks/field.py with the
rate of singer, and judged on the last training shard. It prints a row for each and, for every score, the rank
correlation (Spearman) with the linear probe of the mean patch. If the command is repeated, it continues where it
stopped.
"""

import json
from functools import partial

from field import BASE, METHODS, Field, evaluated
from kept_figures import Figures
from scipy.stats import spearmanr
from setting import TRAIN, chain_parser, line, mode

from pipeline.cache.reader import Cache
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.stages.distill import distill
from pipeline.stages.rank_students import plain_students, rank_students
from pipeline.storage.json_files import write_json

SCORES = ("diswot", "samples", "patches", "gradient", "parameters")


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = chain_parser(__doc__)
    parser.add_argument("--parameters", type=int, default=1_000_000, help="budget of the students")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--shards", type=int, default=5, help="how many of the training shards, two at least")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"parameters": options.parameters, "epochs": options.epochs, "shards": options.shards}
    kept = Figures(options.out / "figures.jsonl", setting)
    chain = Field(options.teacher, options.data, options.out, options.epochs, options.shards, kept)
    method = METHODS[BASE]
    caches, refiners = chain.inputs(method)
    config = chain.config(method, f"distill.epochs={options.epochs}")
    shapes = plain_students(config.student, options.parameters, Cache(caches[0]).manifest.teacher.image_size)
    ranked = rank_students(config, caches[0], options.parameters)
    *most, last = chain.images(TRAIN)
    reached = []
    print(line(["student", *SCORES, "linear, mean patch"]))
    print(line(["---"] * (len(SCORES) + 2)), flush=True)
    for student in ranked.students:
        shape = shapes[student.student]
        run = options.out / f"run-{shape.dim}-{shape.depth}-{shape.mlp_ratio:g}"
        if not (run / RUN_RESULT).exists():
            distill(config.model_copy(update={"student": shape}), caches, run, refiners, mode=mode(run))
        figures = kept.get(run.name, partial(evaluated, run, "classification", most, [last]))
        reached.append(figures["linear"]["mean_patch"]["top1"])
        print(
            line([student.student, *(f"{getattr(student, s):.4g}" for s in SCORES), f"{reached[-1]:.1f}"]), flush=True
        )
    scores = {name: [getattr(student, name) for student in ranked.students] for name in SCORES}
    correlations = {name: float(spearmanr(values, reached).statistic) for name, values in scores.items()}
    write_json(options.out / "correlations.json", correlations)
    print(json.dumps({name: round(value, 2) for name, value in correlations.items()}))


if __name__ == "__main__":
    main()
