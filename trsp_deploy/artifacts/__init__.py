"""Artefacts on disk: fingerprints, whole-or-nothing writes, where they come from, and the run folder. No torch."""

from trsp_deploy.artifacts.fingerprints import SIGNATURE, Sealed, files_below, fingerprint, leaves, seal, size_bytes
from trsp_deploy.artifacts.provenance import Provenance, provenance
from trsp_deploy.artifacts.run_folder import MANIFEST, RunFolder, RunManifest, StepRecord, is_main_process
from trsp_deploy.artifacts.storage import link_tree, storage_errors, write_json, writing

__all__ = [
    "MANIFEST",
    "SIGNATURE",
    "Provenance",
    "RunFolder",
    "RunManifest",
    "Sealed",
    "StepRecord",
    "files_below",
    "fingerprint",
    "is_main_process",
    "leaves",
    "link_tree",
    "provenance",
    "seal",
    "size_bytes",
    "storage_errors",
    "write_json",
    "writing",
]
