"""After stage 3: one HTML page about students, their teachers, their figures and their features.

Run it with `singer report RUN... --out FILE.html`. The figures of tasks are those that `singer evaluate` has stored.
The report itself measures norms and draws pictures, on records spread evenly over the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checks import check_page
from pipeline.data import Spec
from pipeline.evaluation.figures import LEADERBOARD, Mean
from pipeline.models.names import OWN
from pipeline.reports import charts, tables
from pipeline.reports.measure_page import measure
from pipeline.reports.report_page import render_page
from pipeline.reports.runs import Trained, find_cache, read_runs
from pipeline.reports.scores import columns_of, rank, ranking_column, read_figures, score
from pipeline.reports.seeds import group_runs
from pipeline.reports.tables import ReportRow
from pipeline.storage import Place, write_atomic
from pipeline.storage.json_files import read_json
from pipeline.training.distilling.cached_teachers import open_images
from pipeline.training.run_directory import find_runs
from singer.errors import UserError

RECORDS = 256


@dataclass(frozen=True)
class ReportResult:
    """The result of a report.

    out: the page; best: the first group of the leaderboard; rank_by: the figure that ranks it; both are None without
    probes; leaderboard: a row with means for every group of runs that differ only in their seeds;
    mean_max_over_median: {model: mean over the measured images of (largest patch norm / median of all norms)}.
    """

    out: Path
    runs: int
    best: str | None
    rank_by: str | None
    leaderboard: list[dict[str, Any]]
    mean_max_over_median: dict[str, float]


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    cache: Place | None = None,
    refiners: Sequence[Path] = (),
    images: Spec | None = None,
    teacher_probes: Path | None = None,
    students: Sequence[str] = (),
    records: int = RECORDS,
    overwrite: bool = False,
    title: str = "Students of one teacher",
    note: str | None = None,
) -> ReportResult:
    """Write a page about finished runs of one cache.

    runs: folders of singer distill, or sweeps; cache, refiners, images: where the cache, the refiners and the cached
    images are, if they moved; teacher_probes: a folder with the teacher's figures, which singer evaluate --out wrote;
    students: functions, package.module:function, that make students of your own; records: the number of records that
    are measured; note: a text at the top of the page. Raises UserError for mistakes that the user can fix.
    """
    check_page(out, overwrite)
    trained = read_runs(find_runs(runs), refiners)
    _check_functions(students, trained)
    opened = find_cache(trained, cache)
    figures = {run: read_figures(run.folder) for run in trained}
    teacher = read_figures(teacher_probes) if teacher_probes is not None else {}
    if teacher_probes is not None and not teacher:
        raise UserError(f"{teacher_probes} holds no figures of singer evaluate; make them with its --out")
    groups = group_runs(trained)
    columns = columns_of([*figures.values(), teacher])
    by = ranking_column(columns, [*figures.values()], _sweep_ranking(runs))
    # The figure that ranks the students comes first, so that a narrow screen shows it.
    columns.sort(key=lambda column: column != by)
    table = score({g: [figures[run] for run in g.runs] for g in groups}, columns)
    order = rank(table, by)
    with open_images(opened, images) as files:
        measured = measure(opened, [group for _, group in order], files, records, students)
    rows = [
        ReportRow(place, group, charts.colour(n), table[group], Mean.of([measured.norms[run] for run in group.runs]))
        for n, (place, group) in enumerate(order)
    ]
    page = render_page(opened, rows, columns, by, teacher, measured, title, note)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())
    return ReportResult(
        out=out,
        runs=len(trained),
        best=rows[0].group.name if by is not None else None,
        rank_by=by.key if by is not None else None,
        leaderboard=[tables.flat(row, columns) for row in rows],
        mean_max_over_median={one.title: one.mean_max_over_median for one in measured.measurements}
        | {row.group.name: row.norm.mean for row in rows},
    )


def _check_functions(functions: Sequence[str], runs: Sequence[Trained]) -> None:
    """Raise UserError for a function that makes the student of none of the runs."""
    made = {run.config.student.name for run in runs}
    for name in functions:
        if name not in made and not any(own.startswith(OWN) for own in made):
            raise UserError(
                f"--student {name}: it names the function, package.module:function, of a student of your own, and no "
                "run has one of that name; leave it out"
            )


def _sweep_ranking(runs: Sequence[Path]) -> str | None:
    """Return the figure that a sweep is ranked by, or None unless the report is about one sweep alone."""
    if len(runs) != 1 or not (runs[0] / f"{LEADERBOARD}.json").is_file():
        return None
    ranking: str | None = read_json(runs[0], f"{LEADERBOARD}.json", "sweep").get("rank_by")
    return ranking
