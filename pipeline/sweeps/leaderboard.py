"""The leaderboard of a sweep: a ranked row for every group of runs that differ only in their seeds."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation.figures import LEADERBOARD, Mean, figure_in, figures_of, with_bounds, words_of
from pipeline.reports.html import render
from pipeline.storage import write_atomic
from pipeline.storage.json_files import read_json, write_json
from pipeline.sweeps.file import REFINER, Plan, Run
from pipeline.sweeps.jobs import is_done
from pipeline.training.run_directory import RUNS, load_result


@dataclass(frozen=True)
class LeaderboardRow:
    """Runs that differ only in their seeds.

    rank: None if the figure that ranks is missing, or if there are no probes; names: the runs that are done; planned:
    how many runs there will be; changes: {key: value} that the file sets, apart from seeds; figures: in percent;
    seconds: of training, after the last start; loss: of the last epoch.
    """

    rank: int | None
    name: str
    names: list[str]
    planned: int
    changes: dict[str, Any]
    parameters: int
    figures: dict[str, Mean]
    images_per_second: Mean
    seconds: Mean
    loss: Mean


class Leaderboard:
    """The leaderboard of a sweep; files: {run: {task: file of its figures}}; ranked: whether there are probes."""

    def __init__(self, plan: Plan, out: Path, files: dict[str, dict[str, Path]], ranked: bool) -> None:
        self.page = out / f"{LEADERBOARD}.html"
        self.rank_by = plan.rank_by if ranked else None
        self._figures = figures_of(plan.probes) if ranked else []
        self._plan, self._out, self._files = plan, out, files
        # The keys that any run sets; every row of the CSV has them.
        self._keys = list(dict.fromkeys(k for run in plan.runs for k in run.changes if not k.endswith(".seed")))

    def write(self, failed: dict[str, str]) -> None:
        """Write leaderboard.csv, .json and .html with the runs that are done; failed: {run: error}."""
        rows = self.rows()
        write_atomic(self.page.with_suffix(".csv"), self._csv(rows).encode())
        value = {"rank_by": self.rank_by, "rows": [asdict(row) for row in rows], "failed": failed}
        write_json(self.page.with_suffix(".json"), value)
        # Only figures that some student has: a student without CLS has no figures for CLS.
        figures = [f for f in self._figures if any(f in row.figures for row in rows)]
        columns = _columns(rows)
        # Columns with one value in all rows are written below the table.
        same = {name: cells[0] for name, cells in columns.items() if len(rows) > 1 and len(set(cells)) == 1}
        means = [mean for row in rows for mean in row.figures.values()]
        first = 0 if len(self._plan.probes) > 1 else 1
        page = render(
            Path(__file__).with_name(f"{LEADERBOARD}.html.j2"),
            rows=rows,
            figures=figures,
            labels={f: words_of(f)[first:] for f in self._figures},
            rank_by=self.rank_by,
            columns={name: cells for name, cells in columns.items() if name not in same},
            same=same,
            several=any(len(row.names) > 1 for row in rows),
            intervals=any(mean.interval is not None for mean in means),
            failed=failed,
            planned=len(self._plan.runs),
            done=sum(len(row.names) for row in rows),
        )
        write_atomic(self.page, page.encode())

    def summary(self) -> list[dict[str, Any]]:
        """Return flat rows of the means; if there is only one task, the figures' names are without it."""
        first = 0 if len(self._plan.probes) > 1 else 1
        short = {f: ".".join(f.split(".")[first:]) for f in self._figures}
        lines = []
        for row in self.rows():
            ranked: dict[str, Any] = {"rank": row.rank} if self.rank_by is not None else {}
            means = {short[f]: row.figures[f].mean if f in row.figures else None for f in self._figures}
            if self.rank_by is not None:
                means["std"] = row.figures[self.rank_by].std if self.rank_by in row.figures else None
            lines.append({
                **ranked, "run": row.name, "seeds": len(row.names), **means, "parameters": row.parameters,
                "images/s": row.images_per_second.mean, "seconds": row.seconds.mean, "loss": row.loss.mean,
            })  # fmt: skip
        return lines

    def rows(self) -> list[LeaderboardRow]:
        """Return the rows, best first; rows without a rank come last, in the order of the file."""
        groups: dict[str, list[Run]] = {}
        for run in self._plan.runs:
            groups.setdefault(repr(_seedless(run.settings())), []).append(run)
        found = [row for runs in groups.values() if (row := self._row(runs)) is not None]
        if self.rank_by is None:
            return found
        by = self.rank_by
        ranked = sorted((row for row in found if by in row.figures), key=lambda row: -row.figures[by].mean)
        values = [row.figures[by].mean for row in ranked]
        # Equal figures have equal ranks.
        ranked = [LeaderboardRow(**{**vars(row), "rank": 1 + values.index(row.figures[by].mean)}) for row in ranked]
        return ranked + [row for row in found if by not in row.figures]

    def _row(self, runs: list[Run]) -> LeaderboardRow | None:
        done = [run for run in runs if is_done(self._out / RUNS / run.name, self._files[run.name])]
        if not done:
            return None
        results = [load_result(self._out / RUNS / run.name) for run in done]
        probed = [self._read(run) for run in done]
        figures = {f: Mean.of_figure(probed, f) for f in self._figures if all(f in p for p in probed)}
        return LeaderboardRow(
            rank=None,
            name=runs[0].name if len(runs) == 1 else runs[0].label,
            names=[run.name for run in done],
            planned=len(runs),
            changes=_seedless(runs[0].changes),
            parameters=results[0].parameters,
            figures=figures,
            images_per_second=Mean.of([r.images_per_second for r in results]),
            seconds=Mean.of([r.seconds for r in results]),
            loss=Mean.of([r.loss for r in results]),
        )

    def _read(self, run: Run) -> dict[str, float]:
        """Return the figures of a run and their bounds; a student without CLS has no figures for CLS."""
        found: dict[str, float] = {}
        for task, file in self._files[run.name].items():
            result = read_json(file.parent, file.name, "run")
            for figure in (name for f in figures_of([task]) for name in with_bounds(f)):
                value = figure_in(result, figure.partition(".")[2])
                if value is not None:
                    found[figure] = value
        return found

    def _csv(self, rows: list[LeaderboardRow]) -> str:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        numbers = [*self._figures, "images_per_second", "seconds", "loss"]
        spreads = [name for number in numbers for name in (number, f"{number} std")]
        table.writerow(["rank", "run", "seeds", *self._keys, "parameters", *spreads])
        settings = {run.name: run.settings() for run in self._plan.runs}
        for row in rows:
            here = {REFINER: "none", **settings[row.names[0]]}
            means = [row.figures.get(f) for f in self._figures] + [row.images_per_second, row.seconds, row.loss]
            cells = [cell for m in means for cell in ((m.mean, m.std) if m is not None else (None, None))]
            keys = [here.get(key) for key in self._keys]
            table.writerow([row.rank, row.name, len(row.names), *keys, row.parameters, *cells])
        return text.getvalue()


def _columns(rows: Sequence[LeaderboardRow]) -> dict[str, list[str]]:
    """Return {title: a text for every row} of the columns after the figures."""
    counts = [f"{len(row.names)}" + f" of {row.planned}" * (len(row.names) < row.planned) for row in rows]
    return {
        "parameters": [f"{row.parameters:,}" for row in rows],
        "images/s": [row.images_per_second.text("%.0f") for row in rows],
        "seconds": [row.seconds.text("%.0f") for row in rows],
        "loss": [row.loss.text("%.4g") for row in rows],
        "runs": counts,
    }


def _seedless(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.endswith(".seed")}
