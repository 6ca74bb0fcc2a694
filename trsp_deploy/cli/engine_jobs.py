"""What works on an engine folder, wherever its graph comes from: inspect and generate, and `build --onnx` makes one."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from trsp_deploy.cli.options import Json, bounded
from trsp_deploy.cli.terminal import Output, say
from trsp_deploy.errors import RecipeError

Engine = Annotated[Path, typer.Argument(help="An engine folder, such as runs/NAME/engines/ort-cpu-fp32/pruned.")]
Layers = Annotated[bool, typer.Option("--layers", help="List every layer too: kind, kernel, precisions, weights.")]
Prompt = Annotated[list[str], typer.Option("--prompt", help="Text to continue; repeat for a batch.", metavar="TEXT")]
Tokens = Annotated[int, typer.Option("--max-tokens", help="New tokens at most.", min=1, max=10**9)]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0.0, callback=bounded)]
TopK = Annotated[int, typer.Option("--top-k", help="Choose among this many tokens; 0 is all.", min=0)]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", help="Choose among tokens that hold this probability.", min=1e-6, max=1.0, callback=bounded
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of sampling.", min=0)]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", help="Folder of the tokenizer; the run's own when the engine is in a run.", metavar="DIR"
    ),
]

READING = "{}: compares its files with what was built"  # every byte, which takes minutes of a large engine


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("inspect")(inspect)
    app.command("generate")(generate)


def inspect(engine: Engine, layers: Layers = False, as_json: Json = False) -> None:
    """Show what an engine is: versions, shapes, passes, operators or layers, and how trtexec would build it."""
    from trsp_deploy.tools.progress import Heartbeat
    from trsp_deploy.tools.runners.inspection import describe, inspect_engine, layer_table

    with Heartbeat(READING.format(engine)):
        found = inspect_engine(engine)
    if as_json:
        return Output(as_json).result(found.model_dump(mode="json"))
    print(describe(found))
    if layers and found.layers:
        print(f"\n{layer_table(found)}")


def generate(
    engine: Engine,
    prompt: Prompt,
    max_tokens: Tokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    tokenizer: TokenizerFolder = None,
    as_json: Json = False,
) -> None:
    """Continue one or more prompts with a built engine."""
    from trsp_deploy.tools.progress import Heartbeat
    from trsp_deploy.tools.runners import open_engine
    from trsp_deploy.tools.runners.generation import Sampling, prompt_tokens
    from trsp_deploy.tools.runners.generation import generate as continued
    from trsp_deploy.tools.runners.inspection import tokenizer_folder

    sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if (name := sampling.ignored) is not None:
        raise RecipeError(
            f"--{name.replace('_', '-')} {getattr(sampling, name)}: is for sampling, and --temperature {temperature:g} "
            "takes the likeliest token; give a --temperature above 0"
        )
    with Heartbeat(READING.format(engine)):  # refuses an engine that is not the one that was built
        runner = open_engine(engine)
    from trsp_deploy.decoder import end_tokens, load_tokenizer
    from trsp_deploy.tools.quiet import quiet_libraries

    folder = tokenizer or tokenizer_folder(engine)
    with quiet_libraries():
        words, end = load_tokenizer(folder), end_tokens(folder)
    with runner:
        encoded = [words(text, return_special_tokens_mask=True) for text in prompt]
        prompts = [prompt_tokens(each["input_ids"], each["special_tokens_mask"]) for each in encoded]
        found = continued(runner, prompts, sampling.model_copy(update={"end": end}))
    # With the prompt and without: by itself the first token's space is lost to some tokenizers.
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = [
        words.decode([*before, *each.tokens], **plain)[len(words.decode(before, **plain)) :]
        for before, each in zip(prompts, found, strict=True)
    ]
    if any(each.finish == "length" and len(each.tokens) < max_tokens for each in found):
        print(f"{engine}: holds {runner.longest_text} tokens of a text, which ended there", file=sys.stderr)
    if as_json:
        tokens, finish = [each.tokens for each in found], [each.finish for each in found]
        print(json.dumps({"texts": texts, "tokens": tokens, "finish": finish}))
        return
    for text, new in zip(prompt, texts, strict=True):
        print(f"{text}{new}")


def build_from_onnx(
    run: Path | None,
    onnx: Path,
    engines: list[str],
    out: Path | None,
    calibration: str | None,
    tokenizer: Path | None,
    output: Output,
) -> None:
    """An engine of one decoder's ONNX file; of a file and spec that did not change, the engine that is there."""
    if run is not None or len(engines) != 1 or out is None:
        raise RecipeError("build --onnx FILE: needs one --engine and --out DIR, and no run's folder")
    if tokenizer is not None and calibration is None:
        raise RecipeError(f"--tokenizer {tokenizer}: is for the text of --calibration, which is not given")
    from trsp_deploy.stages.build import build_alone
    from trsp_deploy.tools.library import load_engine_spec, spec_file

    command = ["trsp-deploy", "build", "--onnx", str(onnx), "--engine", engines[0], "--out", str(out)]
    command += ["--calibration", calibration] if calibration is not None else []
    command += ["--tokenizer", str(tokenizer)] if tokenizer is not None else []
    spec = load_engine_spec(engines[0])
    manifest, reused = build_alone(
        onnx,
        spec,
        out,
        texts=calibration,
        tokenizer=tokenizer,
        rebuild=shlex.join(command),
        spec_file=spec_file(engines[0]),
        say=say,
    )
    for noted in (manifest.in_floats, manifest.doubt):
        if noted is not None:
            say(f"{spec.name}: {noted}")
    size = f"{manifest.size_bytes / 1e6:.0f} MB"
    how = "as it was built, for nothing has changed" if reused else f"built in {manifest.build_s:.0f} s"
    output.say(f"{out}: {spec.name}, {size}, {how} (`trsp-deploy inspect {out}`)")
    output.result({"engine": manifest.model_dump(mode="json"), "reused": reused})
