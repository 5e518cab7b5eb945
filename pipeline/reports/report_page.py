"""The page of a report, filled from figures that were read and measured."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.info import cache_info
from pipeline.cache.reader import Cache
from pipeline.models.names import LOCAL
from pipeline.reports import GENERATOR, charts, pictures, tables
from pipeline.reports.html import render
from pipeline.reports.measure_page import PageMeasurements
from pipeline.reports.scores import Column, Figures
from pipeline.reports.seeds import differences
from pipeline.reports.tables import ReportRow
from pipeline.runtime.machine import versions
from pipeline.runtime.progress import duration
from pipeline.training.run_directory import LOG
from singer.sizes import Size


def render_page(
    cache: Cache,
    rows: Sequence[ReportRow],
    columns: Sequence[Column],
    by: Column | None,
    teacher: Figures,
    measured: PageMeasurements,
    title: str,
    note: str | None,
) -> str:
    """Return the page as HTML.

    rows: the leaderboard, best first; by: the column that ranks it; teacher: the teacher's figures; note: a text at the
    top of the page.
    """
    groups = [row.group for row in rows]
    reference = {c: teacher[c.probe][c.figure] for c in columns if c.figure in teacher.get(c.probe, {})}
    drawn = groups[: len(charts.COLOURS)]
    tints = {row.group.name: row.colour for row in rows}
    fits = tables.fit_curves(groups)
    info = cache_info(cache.place)
    known = cache.manifest.teacher
    cached = next(t for t in info.teachers if t.variant == known.variant)
    means = [score.mean for row in rows for score in row.scores.values()]
    figures = {
        "tasks": charts.tasks(drawn, {r.group: r.scores for r in rows}, columns, reference),
        "losses": charts.losses(groups, LOG),
        "held_out": charts.held_out(groups, LOG),
        "norms": charts.norms(measured.measurements, tints),
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
        size=Size.of(known.image_size),
        teacher_name=known.architecture if known.name.startswith(LOCAL) else known.name,
        teacher_norm=measured.measurements[0].mean_max_over_median,
        reference=reference,
        several=any(mean.std is not None for mean in means),
        intervals=any(mean.interval is not None for mean in means),
        info=info,
        cached=cached,
        data=cache.manifest.data,
        refiners=tables.refiners(groups),
        differences=differences(groups),
        figures=figures,
        fits=fits,
        measured=measured,
        block=measured.measurements[0].block,
        gradients={"norms": pictures.gradient(pictures.NORMS), "cosines": pictures.gradient(pictures.COSINES)},
        most=pictures.MOST_MEDIANS,
        recipes={group.name: tables.recipe(group) for group in groups},
        made_with=groups[0].runs[0].versions,
        written_with=versions(("singer", "torch", "timm")),
        duration=duration,
    )
