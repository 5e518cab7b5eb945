"""The feature cache: format, codecs, writer and reader. docs/cache-format.md is the normative description."""

from pipeline.cache.codecs import CODECS
from pipeline.cache.manifest import Manifest
from pipeline.cache.reader import Cache

__all__ = ["CODECS", "Cache", "Manifest"]
