"""The commands `generate` and `chat`: their options, the choice of a model or cluster, and the output of `generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from llamaclust.cli import terminal
from llamaclust.cli.chat.sampling_options import with_samplers
from llamaclust.cli.options import (
    NO_GPUS,
    CaFile,
    Cluster,
    CpuMoe,
    Devices,
    Endpoint,
    GpuLayers,
    Gpus,
    Json,
    KeyFile,
    Mmproj,
    ModelDraft,
    Mtp,
    NCpuMoe,
    OverrideTensors,
    Threads,
    option_value,
    text_of,
)
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.cluster.client.base import ChunkStream, TextClient
    from llamaclust.cluster.client.http import Client
    from llamaclust.cluster.client.http_codec import CompletionOptions
    from llamaclust.cluster.front.text.answer import Answer

ModelFile = Annotated[
    str | None, Option("--model", metavar="FILE", help="Run this model in this process, without a cluster.")
]
ServedModel = Annotated[
    str | None,
    Option(
        "--served-model", metavar="NAME", help="Model or adapter that the cluster serves. Default: the first model."
    ),
]
Seed = Annotated[
    int | None,
    Option("--seed", metavar="N", help="Seed for sampling; the same seed gives the same answer. Default: random."),
]


@with_samplers(recommended=False)
def generate(
    prompt: Annotated[str | None, Argument(metavar="PROMPT", help="Text to complete. Default: standard input.")] = None,
    max_tokens: Annotated[int, Option("-n", "--max-tokens", metavar="N", help="Maximum number of tokens.")] = 128,
    seed: Seed = None,
    stop: Annotated[list[str], Option("--stop", metavar="TEXT", help="Stop before this text; repeatable.")] = [],  # noqa: B006
    as_json: Json = False,
    endpoint: Endpoint = None,
    api_key_file: KeyFile = None,
    ca_file: CaFile = None,
    served_model: ServedModel = None,
    model: ModelFile = None,
    image: Annotated[
        list[Path],
        Option("--image", metavar="FILE", help="Image to send with PROMPT as a chat message; repeatable."),
    ] = [],  # noqa: B006  typer reads the default
    mmproj: Mmproj = None,
    threads: Threads = None,
    model_draft: ModelDraft = None,
    mtp: Mtp = False,
    device: Devices = [],  # noqa: B006
    gpu_layers: GpuLayers = "auto",
    cpu_moe: CpuMoe = False,
    n_cpu_moe: NCpuMoe = None,
    override_tensors: OverrideTensors = [],  # noqa: B006
    cluster: Cluster = None,
    *,
    more: dict[str, Any],
) -> None:
    """Complete PROMPT and stream the text."""
    if mmproj is not None and not image:
        raise UsageError("--mmproj is for images: give --image FILE, too")
    from llamaclust.cluster.client.message_images import image_part
    from llamaclust.cluster.front.text.answer import join

    gpus = Gpus(tuple(device), gpu_layers, None, cpu_moe, n_cpu_moe, tuple(override_tensors))
    target = Target(
        cluster,
        endpoint,
        api_key_file,
        model,
        threads,
        gpus=gpus,
        ca_file=ca_file,
        served=served_model,
        draft=model_draft,
        mtp=mtp,
        reads_images=bool(image),
        mmproj=mmproj,
    )
    target.check_drafts(more.get("speculative"))
    text, images = given_or_piped(prompt), [*map(image_part, image)]
    options: CompletionOptions = {"max_tokens": max_tokens, "seed": seed, "stop": stop}
    options |= more  # type: ignore[typeddict-item]
    with target.open() as client, _answer(client, text, images, options) as chunks:
        if as_json:
            print(json.dumps(reply_json(join(chunks))))
        else:
            _print_stream(chunks)


@with_samplers(recommended=True)
def chat(
    system: Annotated[str | None, Option("--system", metavar="TEXT", help="System message.")] = None,
    system_file: Annotated[
        Path | None, Option("--system-file", "-f", metavar="FILE", help="File that contains the system message.")
    ] = None,
    session: Annotated[
        Path | None, Option("--session", metavar="FILE", help="Continue the conversation in FILE, and save it there.")
    ] = None,
    stop: Annotated[
        list[str],
        Option("--stop", "-r", "--reverse-prompt", metavar="TEXT", help="End an answer before this text; repeatable."),
    ] = [],  # noqa: B006  typer reads the default
    stats: Annotated[bool, Option("--stats", help="Show tokens and speed after each answer.")] = False,
    color: Annotated[
        terminal.Color,
        Option("--color", metavar="WHEN", help="Use of colors: on, off, or auto for colors on a terminal only."),
    ] = terminal.Color.AUTO,
    plain: Annotated[
        bool, Option("--plain", help="Show answers as they come, without rendering their Markdown.")
    ] = False,
    commands: Annotated[
        bool,
        Option("--commands", help="Obey commands and @FILE in piped input, too. Unsafe for text that others wrote."),
    ] = False,
    max_tokens: Annotated[
        int | None,
        Option(
            "-n",
            "--max-tokens",
            metavar="N",
            help="Maximum number of tokens in an answer. Default: the rest of the context.",
        ),
    ] = None,
    reasoning_budget: Annotated[
        int | None,
        Option(
            "--reasoning-budget", metavar="N", help="Maximum number of reasoning tokens; 0 for none. Default: no limit."
        ),
    ] = None,
    seed: Seed = None,
    endpoint: Endpoint = None,
    api_key_file: KeyFile = None,
    ca_file: CaFile = None,
    served_model: ServedModel = None,
    model: ModelFile = None,
    chat_template: Annotated[
        str | None,
        Option(
            "--chat-template",
            metavar="NAME",
            help="Built-in chat template or Jinja file to use instead of the template of --model.",
        ),
    ] = None,
    mmproj: Mmproj = None,
    threads: Threads = None,
    model_draft: ModelDraft = None,
    mtp: Mtp = False,
    device: Devices = [],  # noqa: B006  typer reads the default
    gpu_layers: GpuLayers = "auto",
    cpu_moe: CpuMoe = False,
    n_cpu_moe: NCpuMoe = None,
    override_tensors: OverrideTensors = [],  # noqa: B006
    cluster: Cluster = None,
    *,
    more: dict[str, Any],
) -> None:
    """Chat with a model. Ctrl-C interrupts an answer, /help shows the commands. Piped input is read line by line."""
    from llamaclust.cli.chat.answer_screen import uses_color
    from llamaclust.cli.chat.chat import Chat, ChatSettings
    from llamaclust.cluster.client.session import ChatSession
    from llamaclust.cluster.config.values import expand_home

    gpus = Gpus(tuple(device), gpu_layers, None, cpu_moe, n_cpu_moe, tuple(override_tensors))
    target = Target(
        cluster,
        endpoint,
        api_key_file,
        model,
        threads,
        chat_template,
        gpus,
        ca_file,
        served_model,
        model_draft,
        mtp,
        reads_images=True,
        mmproj=mmproj,
    )
    target.check_drafts(more.get("speculative"))
    chosen = {**more, "max_tokens": max_tokens, "seed": seed, "stop": stop, "reasoning_budget": reasoning_budget}
    instruction = _system_message(system, system_file)
    file = None if session is None else Path(option_value("--session", expand_home, str(session)))
    with target.open() as client:
        options = client.chat_sampling() | {name: value for name, value in chosen.items() if value is not None}
        conversation = ChatSession(client, drop_oldest=True, **options)  # type: ignore[arg-type]
        if file is not None and file.exists():
            conversation.load(file)
        if instruction is not None:
            conversation.set_system(instruction)
        Chat(conversation, ChatSettings(uses_color(color), not plain, stats, commands, file)).run()


def _system_message(text: str | None, file: Path | None) -> str | None:
    if text is not None and file is not None:
        raise UsageError("--system and --system-file both give a system message: give one of them")
    if file is not None:
        return option_value("--system-file", text_of, file).strip("\n")
    return None if text is None else terminal.argument(text)


def given_or_piped(prompt: str | None) -> str:
    """Returns the prompt, or standard input without its last line break. Raises UsageError if there is no prompt and
    standard input is a terminal."""
    if prompt is not None and prompt != "-":
        return terminal.argument(prompt)
    if prompt is None and sys.stdin.isatty():
        raise UsageError('no prompt: give a prompt, as in llamaclust generate "Once upon a time", or pipe it in')
    return terminal.piped().removesuffix("\n").removesuffix("\r")


def _answer(client: TextClient, prompt: str, images: Sequence[dict[str, Any]], options: Any) -> ChunkStream:
    from llamaclust.cluster.client.session import ChatSession

    if not images:
        return client.generate(prompt, stream=True, **options)
    # Images come before the text, as in llama.cpp.
    return ChatSession(client).send([*images, prompt], stream=True, **options)


def _print_stream(chunks: ChunkStream) -> None:
    last = "\n"
    for chunk in chunks:
        last = chunk.text or last
        terminal.write(chunk.text)
    print(end="" if last.endswith("\n") else "\n")


def reply_json(reply: Answer) -> dict[str, object]:
    timings = reply.timings
    return {
        "text": reply.text,
        "token_ids": reply.token_ids,
        # Nine significant digits suffice to restore a float32 exactly.
        "logprobs": [float(f"{logprob:.9g}") for logprob in reply.logprobs],
        "prompt_token_ids": reply.prompt_token_ids,
        "finish_reason": reply.finish_reason,
        "seed": reply.seed,
        "timings": {
            "ttft_ms": round(timings.ttft_ms, 3),
            "prefill_tok_s": round(timings.prefill_tok_s, 3),
            "decode_tok_s": round(timings.decode_tok_s, 3),
            "drafted_tokens": timings.drafted_tokens,
            "accepted_tokens": timings.accepted_tokens,
        },
    }


@dataclass(frozen=True, slots=True)
class Target:
    """The model or cluster that the options select. The default is the cluster that runs on this machine."""

    cluster: str | None = None
    endpoint: str | None = None
    api_key_file: Path | None = None
    model: str | None = None
    threads: int | None = None
    chat_template: str | None = None
    gpus: Gpus = NO_GPUS
    ca_file: Path | None = None
    served: str | None = None  # Model or adapter that the cluster serves. None selects the first model.
    draft: str | None = None  # Draft model for speculative decoding with `model`.
    mtp: bool = False  # True if the MTP head of `model` drafts tokens.
    reads_images: bool = False  # True if prompts for `model` may contain images.
    mmproj: str | None = None  # Projector of `model`. None: the projector in the model's folder, if only one fits.

    def check_drafts(self, speculative: int | None) -> None:
        """Raises UsageError if --model-draft or --mtp is given, but `speculative` (0 or False) forbids drafts."""
        given = [option for option, value in (("--model-draft", self.draft), ("--mtp", self.mtp)) if value]
        if given and speculative is not None and not speculative:
            none = "--speculative off" if speculative is False else "--draft-max 0"
            raise UsageError(f"{given[0]} adds drafts, but {none} forbids drafts: give one of them")

    def open(self) -> TextClient:
        """Opens a client. Raises UsageError if options contradict each other or no cluster runs, and RequestError if
        the cluster does not serve the model."""
        from llamaclust.cluster.client.http import Client

        self._check()
        if self.model is not None:
            from llamaclust.cluster.config.catalog import resolve_model
            from llamaclust.cluster.config.values import OFF
            from llamaclust.cluster.launchers.in_process import LocalSettings

            device, gpu_layers, _ = self.gpus.parsed
            settings = LocalSettings(
                chat_template=self.chat_template,
                device=device,
                gpu_layers=gpu_layers,
                cpu_moe=self.gpus.cpu_moe,
                placement=self.gpus.placement,
                draft_model=self._draft_file(),
                mtp=self.mtp,
                mmproj=self.mmproj if self.reads_images else OFF,
            )
            client = Client.local(resolve_model(self.model), self.threads, settings=settings)
            for notice in filter(None, (client.placement, client.unused_projectors)):
                print(notice, file=sys.stderr)
            return client
        with ExitStack() as stack:
            http = stack.enter_context(self._connect())
            http.check_model()
            stack.pop_all()
        return http

    def _draft_file(self) -> Path | None:
        from llamaclust.cluster.config.catalog import resolve_model
        from llamaclust.cluster.launchers.models.draft_model import of_draft_model

        if self.draft is None:
            return None
        with of_draft_model():
            return resolve_model(self.draft)

    def _connect(self) -> Client:
        from llamaclust.cluster.config.environment import environment
        from llamaclust.cluster.state.clusters import find_running

        if self.endpoint is not None:
            return connect(self.endpoint, self.api_key_file, self.ca_file, self.served)
        _, record = find_running(environment().state_dir, self.cluster)
        keys = self.api_key_file or (Path(record.api_keys_file) if record.api_keys_file else None)
        return connect(record.api, keys, model=self.served)

    def _check(self) -> None:
        places = {"--cluster": self.cluster, "--endpoint": self.endpoint, "--model": self.model}
        given = [option for option, value in places.items() if value is not None]
        if len(given) > 1:
            served = "; --served-model chooses a model of a cluster" if self.model is not None else ""
            raise UsageError(f"{' and '.join(given)} cannot be combined: give one of them{served}")
        if self.served is not None and self.model is not None:
            raise UsageError("--served-model is for a cluster, but --model runs one model in this process")
        if self.draft is not None and self.model is None:
            raise UsageError("--model-draft is for --model; for a cluster, set `speculative.model` in the cluster file")
        if self.mtp and self.model is None:
            raise UsageError("--mtp is for --model; for a cluster, set `speculative.mtp` in the cluster file")
        if self.mmproj is not None and self.model is None:
            raise UsageError(
                "--mmproj is for --model; for a cluster, set `mmproj` in the cluster file or give --mmproj to `up`"
            )
        if self.threads is not None and self.model is None:
            raise UsageError("--threads is for --model; for a cluster, set the workers' `threads` in the cluster file")
        if (option := self.gpus.first_option) is not None and self.model is None:
            raise UsageError(f"{option} is for --model; for a cluster, set it for the workers in the cluster file")
        if self.chat_template is not None and self.model is None:
            raise UsageError(
                "--chat-template is for --model; for a cluster, set it in the cluster file or give it to `up`"
            )
        if self.ca_file is not None and self.endpoint is None:
            raise UsageError("--ca-file is for --endpoint; a local cluster's certificate is already known")
        if self.api_key_file is not None and self.model is not None:
            raise UsageError("--api-key-file is for a cluster; a model in this process needs no key")


def connect(endpoint: str, api_key_file: Path | None, ca_file: Path | None = None, model: str | None = None) -> Client:
    """Returns a client with the first key in `api_key_file` (None: no key). Raises UsageError if the file has none."""
    from llamaclust.cluster.client.http import Client
    from llamaclust.cluster.state.api_keys import first_key

    key = None if api_key_file is None else first_key(api_key_file)
    return Client(endpoint, key, verify=ca_file, model=model)
