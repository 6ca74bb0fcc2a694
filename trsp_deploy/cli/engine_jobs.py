"""The commands that work on an engine folder, wherever its graph comes from: inspect and generate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from trsp_deploy.cli.options import Json, finite

Engine = Annotated[Path, typer.Argument(help="An engine folder, such as runs/NAME/engines/ort-cpu-fp32/pruned.")]
Prompt = Annotated[list[str], typer.Option("--prompt", help="Text to continue; repeat for a batch.", metavar="TEXT")]
Tokens = Annotated[int, typer.Option("--max-tokens", help="New tokens at most.", min=1, max=10**9)]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0.0, callback=finite)]
TopK = Annotated[int, typer.Option("--top-k", help="Choose among this many tokens; 0 is all.", min=0)]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Choose among tokens that hold this probability.", min=1e-6, max=1.0, callback=finite),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of sampling.", min=0)]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", help="Folder of the tokenizer; the run's own when the engine is in a run.", metavar="DIR"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("inspect")(inspect)
    app.command("generate")(generate)


def inspect(engine: Engine, as_json: Json = False) -> None:
    """Show what an engine is: versions, shapes, passes, operators or layers, and how trtexec would build it."""
    from trsp_deploy.tools.runners.inspection import describe, inspect_engine

    found = inspect_engine(engine)
    print(json.dumps(found.model_dump(mode="json")) if as_json else describe(found))


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
    from trsp_deploy.tools.runners import open_engine
    from trsp_deploy.tools.runners.inspection import tokenizer_folder

    runner = open_engine(engine)  # refuses an engine that is not the one that was built, before anything slow
    from trsp_deploy.decoder import end_tokens, load_tokenizer
    from trsp_deploy.tools.quiet import quiet_libraries
    from trsp_deploy.tools.runners.generation import Sampling
    from trsp_deploy.tools.runners.generation import generate as continued

    folder = tokenizer or tokenizer_folder(engine)
    with quiet_libraries():
        words, end = load_tokenizer(folder), end_tokens(folder)
    sampling = Sampling(
        max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, end=end
    )
    with runner:
        prompts = [words(text)["input_ids"] for text in prompt]
        found = continued(runner, prompts, sampling)
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
