"""A student alone, in a format that others load: `singer export RUN --to timm|hf|onnx|torch-export --out FOLDER`.

A format is one line in FORMATS and one function, which writes the student, reads it back and returns the code that
loads it. The export is written to a scratch folder, read back and compared with the student. It is copied to --out
only if both agree.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.models.loading import load_saved
from pipeline.outputs.folder import Mode, check_output, claimed_output
from pipeline.reports.model_card import ModelCard, caveats, write_card
from pipeline.runtime.devices import own_settings
from pipeline.runtime.progress import say
from pipeline.storage import write_atomic
from pipeline.students.export_formats import FORMATS, LastBlock, Student, compare
from pipeline.training.run_directory import DistillResult, load_result, load_run_config
from singer.errors import require_known

STAGE = "export"
CARD = "README.md"


@dataclass(frozen=True)
class ExportResult:
    """An export; max_difference: the largest difference from the student's output on a fixed random batch."""

    export: Path
    format: str
    output: str
    bytes: int
    parameters: int
    max_difference: float


@own_settings()
def export(config: Config, run: Path, out: Path, to: str, mode: Mode = "new") -> ExportResult:
    """Write the student of a finished run to `out` in the format `to`.

    Only the section export of `config` is used, and student.name for a student of one's own. Raises UserError for
    mistakes that the user can fix, and if the export differs from the student.
    """
    require_known("--to", to, FORMATS)
    trained = load_result(run)
    recipe = load_run_config(run).model_copy(update={"export": config.export})
    check_output(out, mode, STAGE, recipe, [run])
    backbone = load_saved(trained.student, function=config.student.name)
    student = Student(
        backbone,
        LastBlock(backbone.model) if config.export.output == "tokens" else backbone.model,
        config.export.output,
    )
    with tempfile.TemporaryDirectory(prefix="singer-export-") as scratch:
        written = FORMATS[to](student, Path(scratch))
        difference = compare(student, written.load, config.export)
        card = ModelCard(
            to, student.output, run, trained, recipe, backbone, difference, written.snippet, written.packages
        )
        text = write_card(card)
        for caveat in caveats(backbone, trained):
            say(f"note: {caveat}")
        with claimed_output(out, mode, STAGE, recipe, None):
            for file in sorted(Path(scratch).iterdir()):
                write_atomic(out / file.name, file.read_bytes())
            # The card comes last: an export without one was interrupted.
            write_atomic(out / CARD, text.encode())
    return _result(out, to, student, trained, difference)


def _result(out: Path, to: str, student: Student, trained: DistillResult, difference: float) -> ExportResult:
    size = sum(file.stat().st_size for file in out.iterdir())
    return ExportResult(out, to, student.output, size, trained.parameters, difference)
