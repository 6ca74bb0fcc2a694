"""Artefacts on disk: fingerprints, whole-or-nothing writes, where they come from, and the run folder. No torch."""

from trsp_deploy.artifacts.fingerprints import SIGNATURE, Sealed, files_below, fingerprint, leaves, seal, size_bytes
from trsp_deploy.artifacts.layout import (
    ENGINE_MANIFEST,
    MANIFEST,
    RUN_MARK,
    RunLayout,
    check_is_run,
    check_no_sweep,
    model_of_engine,
    run_of_engine,
)
from trsp_deploy.artifacts.locks import locked, writing_alone
from trsp_deploy.artifacts.provenance import Provenance, provenance
from trsp_deploy.artifacts.run_folder import (
    Finished,
    Made,
    RunFolder,
    RunManifest,
    Step,
    StepRecord,
    check_made,
    reading_alone,
)
from trsp_deploy.artifacts.storage import (
    free_bytes,
    link_tree,
    nearest_existing,
    share_weights,
    storage_errors,
    write_json,
    writing,
)

__all__ = [
    "ENGINE_MANIFEST",
    "MANIFEST",
    "RUN_MARK",
    "SIGNATURE",
    "Finished",
    "Made",
    "Provenance",
    "RunFolder",
    "RunLayout",
    "RunManifest",
    "Sealed",
    "Step",
    "StepRecord",
    "check_is_run",
    "check_made",
    "check_no_sweep",
    "files_below",
    "fingerprint",
    "free_bytes",
    "leaves",
    "link_tree",
    "locked",
    "model_of_engine",
    "nearest_existing",
    "provenance",
    "reading_alone",
    "run_of_engine",
    "seal",
    "share_weights",
    "size_bytes",
    "storage_errors",
    "write_json",
    "writing",
    "writing_alone",
]
