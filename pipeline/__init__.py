"""The Python API: each command is a function of a configuration and paths, which returns a result object.

    from pipeline import cache_teacher, distill, load_config, refine

All functions raise singer.errors.UserError for mistakes that the caller can fix; docs/python.md has examples. A name
is imported when it is first used, so that `import pipeline` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cache.info import CacheInfo, cache_info
    from pipeline.cache.reader import Cache
    from pipeline.chains.demo import DemoResult, demo
    from pipeline.chains.run import RunResult, run
    from pipeline.config import Config, load_config
    from pipeline.evaluation.context import EvaluateResult
    from pipeline.planning.plan import PlanResult, plan
    from pipeline.stages.cache_teacher import CacheResult, cache_teacher
    from pipeline.stages.distill import distill, fan_out
    from pipeline.stages.embed import EmbedResult, embed
    from pipeline.stages.evaluate import evaluate, evaluate_tasks
    from pipeline.stages.export import ExportResult, export
    from pipeline.stages.finetune import FinetuneResult, finetune
    from pipeline.stages.inspect import InspectResult, inspect
    from pipeline.stages.prepare import PrepareResult, prepare
    from pipeline.stages.rank import RankResult, rank
    from pipeline.stages.rank_students import RankStudentsResult, rank_students
    from pipeline.stages.refine import RefineResult, refine
    from pipeline.stages.report import ReportResult, report
    from pipeline.stages.verify import VerifyResult, verify
    from pipeline.sweeps.run import SweepResult, sweep
    from pipeline.training.distilling.runs import StudentSpec
    from pipeline.training.run_directory import DistillResult

__all__ = [
    "Cache",
    "CacheInfo",
    "CacheResult",
    "Config",
    "DemoResult",
    "DistillResult",
    "EmbedResult",
    "EvaluateResult",
    "ExportResult",
    "FinetuneResult",
    "InspectResult",
    "PlanResult",
    "PrepareResult",
    "RankResult",
    "RankStudentsResult",
    "RefineResult",
    "ReportResult",
    "RunResult",
    "StudentSpec",
    "SweepResult",
    "VerifyResult",
    "cache_info",
    "cache_teacher",
    "demo",
    "distill",
    "embed",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fan_out",
    "finetune",
    "inspect",
    "load_config",
    "plan",
    "prepare",
    "rank",
    "rank_students",
    "refine",
    "report",
    "run",
    "sweep",
    "verify",
]

_MODULES = {
    "Cache": "pipeline.cache.reader",
    "CacheInfo": "pipeline.cache.info",
    "CacheResult": "pipeline.stages.cache_teacher",
    "Config": "pipeline.config",
    "DemoResult": "pipeline.chains.demo",
    "DistillResult": "pipeline.training.run_directory",
    "EmbedResult": "pipeline.stages.embed",
    "EvaluateResult": "pipeline.evaluation.context",
    "ExportResult": "pipeline.stages.export",
    "FinetuneResult": "pipeline.stages.finetune",
    "InspectResult": "pipeline.stages.inspect",
    "PlanResult": "pipeline.planning.plan",
    "PrepareResult": "pipeline.stages.prepare",
    "RankResult": "pipeline.stages.rank",
    "RankStudentsResult": "pipeline.stages.rank_students",
    "RefineResult": "pipeline.stages.refine",
    "ReportResult": "pipeline.stages.report",
    "RunResult": "pipeline.chains.run",
    "StudentSpec": "pipeline.training.distilling.runs",
    "SweepResult": "pipeline.sweeps.run",
    "VerifyResult": "pipeline.stages.verify",
    "cache_info": "pipeline.cache.info",
    "cache_teacher": "pipeline.stages.cache_teacher",
    "demo": "pipeline.chains.demo",
    "distill": "pipeline.stages.distill",
    "embed": "pipeline.stages.embed",
    "evaluate": "pipeline.stages.evaluate",
    "evaluate_tasks": "pipeline.stages.evaluate",
    "export": "pipeline.stages.export",
    "fan_out": "pipeline.stages.distill",
    "finetune": "pipeline.stages.finetune",
    "inspect": "pipeline.stages.inspect",
    "load_config": "pipeline.config",
    "plan": "pipeline.planning.plan",
    "prepare": "pipeline.stages.prepare",
    "rank": "pipeline.stages.rank",
    "rank_students": "pipeline.stages.rank_students",
    "refine": "pipeline.stages.refine",
    "report": "pipeline.stages.report",
    "run": "pipeline.chains.run",
    "sweep": "pipeline.sweeps.run",
    "verify": "pipeline.stages.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
