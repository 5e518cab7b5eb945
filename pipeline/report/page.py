"""What was trained on what, what came of it and what it looks like: one page that needs no other file.

`singer report RUN... --out FILE.html`. Figures of tasks are those that `singer evaluate` has stored; norms and pictures
are measured now, on records spread evenly over the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.info import cache_info
from pipeline.cache.reader import Cache
from pipeline.report import charts, pictures, tables
from pipeline.report.figures import Measured, measure
from pipeline.report.pages import render
from pipeline.report.runs import find_cache, find_runs, read_runs
from pipeline.report.scores import Column, Figures, columns_of, rank, ranking_column, read_figures, score
from pipeline.report.seeds import differences, group_runs
from pipeline.report.tables import Row
from pipeline.runtime.machine import versions
from pipeline.runtime.progress import duration
from pipeline.storage import Place, write_atomic
from pipeline.storage.outputs import read_json
from pipeline.sweep.leaderboard import NAME, Mean
from pipeline.teachers.models import LOCAL
from pipeline.training.run_directory import LOG
from pipeline.training.teachers import open_images
from singer.errors import UserError

# What tells a page of ours from other files.
GENERATOR = "singer report"
RECORDS = 256


@dataclass(frozen=True)
class ReportResult:
    """out: the page; best: the first of the leaderboard, by the figure rank_by; both None without probes.

    leaderboard: a row for every group of runs that differ in seeds only, with means; mean_max_over_median: {model: mean
    over the measured images of the largest patch norm over the median of all}.
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
    adapters: Sequence[Path] = (),
    shards: str | Sequence[str] | None = None,
    teacher_probes: Path | None = None,
    records: int = RECORDS,
    overwrite: bool = False,
    title: str = "Students of one teacher",
    note: str | None = None,
) -> ReportResult:
    """Write a page about finished runs of one cache. Raises UserError for whatever the user can mend.

    runs: folders of singer distill, or sweeps. cache, adapters, shards: where cache, refiners and images lie now, if
    they have moved; teacher_probes: a folder with the teacher's figures, of singer evaluate --out; records: how many
    are measured; note: what to know before anything else.
    """
    check_page(out, overwrite)
    trained = read_runs(find_runs(runs), adapters)
    opened = find_cache(trained, cache)
    figures = {run: read_figures(run.folder) for run in trained}
    teacher = read_figures(teacher_probes) if teacher_probes is not None else {}
    if teacher_probes is not None and not teacher:
        raise UserError(f"{teacher_probes} holds no figures of singer evaluate; make them with its --out")
    groups = group_runs(trained)
    columns = columns_of([*figures.values(), teacher])
    by = ranking_column(columns, [*figures.values()], _asked(runs))
    # What students are ranked by is what a narrow screen shows first.
    columns.sort(key=lambda column: column != by)
    table = score({g: [figures[run] for run in g.runs] for g in groups}, columns)
    order = rank(table, by)
    with open_images(opened, shards) as files:
        measured = measure(opened, [group for _, group in order], files, records)
    rows = [
        Row(place, group, charts.colour(n), table[group], Mean.of([measured.norms[run] for run in group.runs]))
        for n, (place, group) in enumerate(order)
    ]
    page = _page(opened, rows, columns, by, teacher, measured, title, note)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())
    return ReportResult(
        out=out,
        runs=len(trained),
        best=rows[0].group.name if by is not None else None,
        rank_by=by.key if by is not None else None,
        leaderboard=[tables.flat(row, columns) for row in rows],
        mean_max_over_median={look.title: look.mean_max_over_median for look in measured.looks}
        | {row.group.name: row.norm.mean for row in rows},
    )


def _asked(runs: Sequence[Path]) -> str | None:
    """What a sweep ranks by, if the report is about one sweep alone."""
    if len(runs) != 1 or not (runs[0] / f"{NAME}.json").is_file():
        return None
    asked: str | None = read_json(runs[0], f"{NAME}.json", "sweep").get("rank_by")
    return asked


def check_page(out: Path, overwrite: bool) -> None:
    """Raise UserError if no page may be written there; changes nothing."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: a report is one file; give a name that ends in .html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists; replace it with --overwrite, or give another --out")
    if f'content="{GENERATOR}"'.encode() not in out.read_bytes()[:4096]:
        raise UserError(f"{out} was not written by {GENERATOR} and is left alone; give another --out")


def _page(
    cache: Cache,
    rows: Sequence[Row],
    columns: Sequence[Column],
    by: Column | None,
    teacher: Figures,
    measured: Measured,
    title: str,
    note: str | None,
) -> str:
    groups = [row.group for row in rows]
    reference = {c: teacher[c.probe][c.figure] for c in columns if c.figure in teacher.get(c.probe, {})}
    drawn = groups[: len(charts.COLOURS)]
    tints = {row.group.name: row.colour for row in rows}
    fits = tables.fit_curves(groups)
    info = cache_info(cache.place)
    known = cache.manifest.teacher
    of = next(t for t in info.teachers if t.variant == known.variant)
    means = [score.mean for row in rows for score in row.scores.values()]
    figures = {
        "tasks": charts.tasks(drawn, {r.group: r.scores for r in rows}, columns, reference),
        "losses": charts.losses(groups, LOG),
        "norms": charts.norms(measured.looks, tints),
        "fits": charts.fits(fits) if fits else None,
    }
    return render(
        Path(__file__).with_name("report.html.j2"),
        generator=GENERATOR,
        title=title,
        note=note,
        cards=tables.cards(rows, by, measured, known),
        rows=rows,
        columns=columns,
        by=by,
        teacher=known,
        teacher_name=known.architecture if known.name.startswith(LOCAL) else known.name,
        teacher_norm=measured.looks[0].mean_max_over_median,
        reference=reference,
        several=any(mean.std is not None for mean in means),
        intervals=any(mean.interval is not None for mean in means),
        info=info,
        of=of,
        data=cache.manifest.data,
        refiners=tables.refiners(groups),
        differences=differences(groups),
        figures=figures,
        fits=fits,
        measured=measured,
        block=measured.looks[0].block,
        gradients={"norms": pictures.gradient(pictures.NORMS), "cosines": pictures.gradient(pictures.COSINES)},
        most=pictures.MOST_MEDIANS,
        recipes={group.name: tables.recipe(group) for group in groups},
        made_with=groups[0].runs[0].versions,
        written_with=versions(("singer", "torch", "timm")),
        duration=duration,
    )
