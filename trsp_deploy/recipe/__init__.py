"""What a user may ask for, as frozen, strict records: a `Recipe` and an `EngineSpec`. Imports no torch."""

from trsp_deploy.recipe.drops import parse_drop, parse_drops
from trsp_deploy.recipe.engine_spec import (
    FLOAT_BYTES,
    Backend,
    EngineSpec,
    Float,
    Precision,
    Range,
    ShapeProfile,
    engine_name,
    named_by_file,
)
from trsp_deploy.recipe.settings import (
    AUTO_ENGINES,
    METHODS,
    BenchSettings,
    Case,
    ExportSettings,
    Recipe,
    TransferSettings,
    shown_name,
)
from trsp_deploy.recipe.validation import kept_recipe, override, read_bench_settings, read_engine_spec, read_recipe
from trsp_deploy.recipe.values import LONGEST_NAME, Count, Name, NonNegative, Positive, RelativePath, Strict, Text

__all__ = [
    "AUTO_ENGINES",
    "FLOAT_BYTES",
    "LONGEST_NAME",
    "METHODS",
    "Backend",
    "BenchSettings",
    "Case",
    "Count",
    "EngineSpec",
    "ExportSettings",
    "Float",
    "Name",
    "NonNegative",
    "Positive",
    "Precision",
    "Range",
    "Recipe",
    "RelativePath",
    "ShapeProfile",
    "Strict",
    "Text",
    "TransferSettings",
    "engine_name",
    "kept_recipe",
    "named_by_file",
    "override",
    "parse_drop",
    "parse_drops",
    "read_bench_settings",
    "read_engine_spec",
    "read_recipe",
    "shown_name",
]
