"""The configuration: one frozen, validated tree. Commands read it, and pass its sections on."""

from pipeline.config.distill import DistillConfig
from pipeline.config.fields import Affects, Meta, Section, keys, left_open, meta, section_of
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.kinds import Dtype, InputSize, LocalCopy, Offload, Positive, Precision
from pipeline.config.load import dump_config, load_config, read_dumped, recipes, resource
from pipeline.config.refine import RefineConfig
from pipeline.config.sections import (
    MAX_PIXELS,
    CacheConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    TeacherConfig,
    ViewsConfig,
)
from pipeline.config.student import StudentConfig
from pipeline.config.training import TrainingConfig

__all__ = [
    "MAX_PIXELS",
    "Affects",
    "CacheConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "Dtype",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "InputSize",
    "LocalCopy",
    "Meta",
    "Offload",
    "Positive",
    "Precision",
    "PrepareConfig",
    "RefineConfig",
    "Section",
    "StudentConfig",
    "TeacherConfig",
    "TrainingConfig",
    "ViewsConfig",
    "dump_config",
    "keys",
    "left_open",
    "load_config",
    "meta",
    "read_dumped",
    "recipes",
    "resource",
    "section_of",
]
