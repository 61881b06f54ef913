"""`generate` and `chat`: talk to a cluster, or to a model in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamaclust.cli.gpu_options import Devices, GpuLayers, Gpus
from llamaclust.cli.help import PlainCommand
from llamaclust.cli.sampler_options import with_samplers

if TYPE_CHECKING:
    from llamaclust.cluster.client.types import Options

Cluster = Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Which, where several run.")]
Endpoint = Annotated[str | None, typer.Option("--endpoint", metavar="URL", help="Address of a cluster's API.")]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="File whose first line is the API key.")
]
ModelFile = Annotated[
    str | None, typer.Option("--model", metavar="FILE", help="Run this model in this process, without a cluster.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", metavar="N", min=1, max=1024, help="Threads that compute, for --model.")
]
Temperature = Annotated[float, typer.Option("--temperature", metavar="X", help="0 chooses the likeliest token.")]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same answer; drawn by default.")
]
TopK = Annotated[int, typer.Option("--top-k", metavar="N", help="Only that many of the likeliest tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", help="Only the likeliest tokens that reach this probability.")
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", metavar="P", help="Keep tokens with at least this fraction of the top token's probability."
    ),
]


@with_samplers
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to go on from; `-`: standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", metavar="N", help="Tokens, at most.")] = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    stop: Annotated[list[str], typer.Option("--stop", metavar="TEXT", help="End before this text.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    endpoint: Endpoint = None,
    api_key_file: KeyFile = None,
    model: ModelFile = None,
    threads: Threads = None,
    device: Devices = [],  # noqa: B006  typer reads the default
    gpu_layers: GpuLayers = "auto",
    cluster: Cluster = None,
    *,
    more: dict[str, Any],
) -> None:
    """Go on from PROMPT and print the text as it comes."""
    from llamaclust.cli import generation
    from llamaclust.cli.connect import Target

    text = generation.given_or_piped(prompt)
    target = Target(cluster, endpoint, api_key_file, model, threads, gpus=Gpus(tuple(device), gpu_layers))
    options = sampling(max_tokens, temperature, seed, top_k, top_p, min_p, more)
    options["stop"] = stop
    (generation.print_json if as_json else generation.print_stream)(target, text, options)


@with_samplers
def chat(
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", metavar="N", help="Tokens of an answer, at most.")
    ] = None,
    temperature: Temperature = 0.8,
    seed: Seed = None,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    endpoint: Endpoint = None,
    api_key_file: KeyFile = None,
    model: ModelFile = None,
    chat_template: Annotated[
        str | None,
        typer.Option("--chat-template", metavar="NAME", help="Or FILE: instead of the model's, for --model."),
    ] = None,
    threads: Threads = None,
    device: Devices = [],  # noqa: B006  typer reads the default
    gpu_layers: GpuLayers = "auto",
    cluster: Cluster = None,
    *,
    more: dict[str, Any],
) -> None:
    """Chat: Ctrl-C interrupts an answer, /help shows more. Piped input is taken line by line."""
    from llamaclust.cli.chat import Chat
    from llamaclust.cli.connect import Target

    target = Target(cluster, endpoint, api_key_file, model, threads, chat_template, Gpus(tuple(device), gpu_layers))
    with target.open() as client:
        Chat(client, system, sampling(max_tokens, temperature, seed, top_k, top_p, min_p, more)).run()


def sampling(
    max_tokens: int | None,
    temperature: float,
    seed: int | None,
    top_k: int,
    top_p: float,
    min_p: float,
    more: dict[str, Any],
) -> Options:
    """The options that both commands take."""
    plain: Options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    return {**plain, **more}  # type: ignore[typeddict-item]


def register(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    app.command(cls=PlainCommand)(generate)
    app.command(cls=PlainCommand)(chat)
