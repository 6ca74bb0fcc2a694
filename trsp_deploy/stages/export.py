"""PyTorch to ONNX for text generation with past key values, through Optimum.

Optimum's own validation only warns, so it is left out: `stages/parity.py` is the check.
"""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import ExportSettings, Precision
from trsp_deploy.tools.quiet import quiet_libraries

FILE = "model.onnx"


def export_onnx(model: Path, precision: Precision, settings: ExportSettings, out: Path) -> tuple[str, ...]:
    """Export the model in a Hugging Face folder into `out`/model.onnx; returns the names of external data files.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.{key,value}; outputs: logits,
    present.N.{key,value}. Above 2 GB the weights go to files beside the graph.
    Raises ModelError when Optimum cannot export the architecture.
    """
    with quiet_libraries():
        # Importing Optimum loads half of transformers, and its loggers must be quiet before it speaks.
        from optimum.exporters.onnx import main_export

        try:
            main_export(
                str(model),
                output=out,
                task="text-generation-with-past",
                opset=settings.opset,
                dtype=precision,
                local_files_only=True,
                do_validation=False,
                slim=settings.slim,
            )
        except (ValueError, KeyError, NotImplementedError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise ModelError(f"{model}: Optimum cannot export it to ONNX ({reason})") from problem
    return tuple(
        sorted(path.name for path in out.iterdir() if path.name.startswith(f"{FILE}_") or path.suffix == ".data")
    )
