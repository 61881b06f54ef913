"""The `llamaclust model` commands that fetch, list, remove, inspect and evaluate model files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from llamaclust.cli import terminal
from llamaclust.cli.options import (
    MODEL_HELP,
    CaFile,
    Chunks,
    CpuMoe,
    Devices,
    Endpoint,
    GpuLayers,
    Gpus,
    Json,
    KeyFile,
    KvTypeOption,
    LocalModel,
    NCpuMoe,
    OverrideTensors,
    Threads,
    Workers,
    option_value,
)
from llamaclust.cli.terminal import printable
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.sizes import MIB, gigabytes

if TYPE_CHECKING:
    from llamaclust.cluster.config.catalog import CatalogEntry
    from llamaclust.model.gguf.model_file import ModelFile
    from llamaclust.tools.model_fit import Fit
    from llamaclust.tools.model_info import ModelInfo, Share

_TEXT_WIDTH = 100
ModelArgument = Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)]


def pull(
    models: Annotated[list[str], Argument(metavar="MODEL...", help=MODEL_HELP)],
    as_lines: Annotated[
        bool,
        Option("--json-lines", help="Print progress as JSON lines, and do not print the model's path at the end."),
    ] = False,
) -> None:
    """Download models. An interrupted download is resumed, and the bytes are checked before use."""
    from llamaclust.cli.progress import JsonLines, announce, shown_progress
    from llamaclust.tools.hub.pull import pull_model

    for model in models:
        _check_known(model)
    for model in models:
        if as_lines:
            pull_model(model, JsonLines())
            continue
        announce(model)
        with shown_progress() as progress:
            path = pull_model(model, progress)
        print(path)


def _check_known(model: str) -> None:
    from llamaclust.tools.assume.public_shapes import no_file_hint
    from llamaclust.tools.hub.pull import check_known

    try:
        check_known(model)
    except UsageError as error:
        hint = no_file_hint(model)
        raise error if hint is None else UsageError(hint) from error


def list_models(
    wanted: Annotated[
        str, Argument(metavar="FILTER", help="Show only models whose name or properties contain this text.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List downloaded models and the catalog."""
    from llamaclust.cluster.config.catalog import catalog_names, find_entry, stored_models
    from llamaclust.tools.assume.assumed_model import with_file_size
    from llamaclust.tools.assume.public_shapes import no_file_hint
    from llamaclust.tools.assume.shapes import SHAPES

    everything = stored_models()
    known = {entry.directory: entry for name in catalog_names() if (entry := find_entry(name))}

    def is_wanted(name: str, entry: CatalogEntry | None) -> bool:
        return wanted.lower() in f"{name}\n{entry.summary if entry else ''}".lower()

    stored = [model for model in everything if is_wanted(model.name, known.get(model.name))]
    for model in everything:
        known.pop(model.name, None)
    entries = [with_file_size(entry) for entry in known.values() if is_wanted(entry.name, entry)]
    if as_json:
        rows = [{"name": model.name, "size_bytes": model.size_bytes, "path": str(model.path)} for model in stored]
        print(json.dumps({"models": rows + [_entry_json(entry) for entry in entries]}))
        return
    if wanted and not stored and not entries:
        hints = filter(None, (no_file_hint(name) for name in SHAPES if wanted.lower() in name))
        print("\n".join(hints) or f"no model has a name or properties that contain {printable(wanted)}")
        return
    for model in stored:
        print(f"{model.name:32} {gigabytes(model.size_bytes):>10}  {model.path}")
    if entries:
        print("not downloaded; run: llamaclust model pull NAME")
    for entry in entries:
        print(f"  {entry.name:40} {entry.shown_size:>14}  {entry.licence}; {entry.summary}")


def _entry_json(entry: CatalogEntry) -> dict[str, Any]:
    size = entry.size_bytes or entry.about_bytes
    known = {"source": entry.source, "licence": entry.licence, "terms": entry.terms, "summary": entry.summary}
    return {"name": entry.name, "size_bytes": size, "path": None, **known}


def remove(model: ModelArgument) -> None:
    """Delete a downloaded model. Files outside the models directory are never touched."""
    from llamaclust.cluster.config.catalog import remove_model

    print(remove_model(model))


def info(
    model: LocalModel,
    memory: Annotated[
        str | None,
        Option("--memory", metavar="SIZE", help="Memory that the model may use, e.g. 8GiB. Default: free memory."),
    ] = None,
    threads: Annotated[int, Option("--threads", "-t", metavar="N", min=1, max=1024, help="Threads of a worker.")] = 1,
    as_json: Json = False,
) -> None:
    """Show metadata, parameters, bits per weight, bytes per type and layer, and what fits in memory.

    Files that cannot be run are shown, too."""
    from llamaclust.cluster.config.values import parse_size
    from llamaclust.model.gguf.model_file import open_model
    from llamaclust.tools.model_fit import fit
    from llamaclust.tools.model_info import as_json as info_as_json
    from llamaclust.tools.model_info import describe
    from llamaclust.tools.projector_info import describe_projector, is_projector, projector_beside
    from llamaclust.worker.devices.system_info import available_memory_bytes

    file = open_model(model)
    available_bytes = available_memory_bytes() if memory is None else option_value("--memory", parse_size, memory)
    found, projector, fitting, beside, problem = describe(file), None, None, None, None
    try:
        if is_projector(file):
            projector = describe_projector(file)
        else:
            fitting = fit(file.path, available_bytes, threads)
            beside = projector_beside(file.path, threads)
    except LlamaclustError as error:
        problem = str(error)
    if as_json:
        memory_json = None if fitting is None else fitting.as_json()
        projector_json = None if projector is None else projector.as_json()
        beside_json = None if beside is None else beside.as_json()
        run = {"projector": projector_json, "beside": beside_json, "memory": memory_json, "problem": problem}
        print(json.dumps({**info_as_json(file, found), **run}))
        return
    _print_info(file, found)
    if problem is not None:
        print(f"\ncannot be run here: {printable(problem)}")
    if projector is not None:
        print("", *projector.lines(), sep="\n")
    if fitting is not None:
        print("\nin memory")
        _print_fit(fitting)
    if beside is not None:
        print("", *map(printable, beside.lines()), sep="\n")


def tokenize(
    model: LocalModel,
    text: Annotated[str | None, Argument(metavar="TEXT", help="Text to tokenize. Default: standard input.")] = None,
    no_special: Annotated[bool, Option("--no-special", help="Add no BOS or EOS token.")] = False,
    parse_special: Annotated[
        bool, Option("--parse-special", help="Treat text such as </s> as the special token of that name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the token ids of a text. A file with a vocabulary and no weights is sufficient."""
    from llamaclust.model.gguf.model_file import open_model
    from llamaclust.model.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(open_model(model).metadata)
    text = terminal.piped() if text is None else terminal.argument(text)
    ids = tokenizer.encode(text, add_special=not no_special, parse_special=parse_special)
    if as_json:
        print(json.dumps({"token_ids": ids, "tokens": [tokenizer.token_text(token_id) for token_id in ids]}))
    else:
        print(" ".join(map(str, ids)))


def _print_info(model: ModelFile, info: ModelInfo) -> None:
    from llamaclust.tools.model_info import shown_metadata

    print(
        f"{model.path}  {_mib(model.size_bytes).strip()}" + (f" in {len(model.parts)} files" * (len(model.parts) > 1))
    )
    print(f"identity {model.identity}\n\nmetadata")
    for key, value in shown_metadata(model).items():
        print(f"  {printable(key)} = {_one_line(value)}")
    total = info.total
    print(
        f"\nweights  {total.parameters:,} parameters in {total.tensors} tensors, {total.bits_per_weight:.2f} bits each"
    )
    _print_shares("by type", info.by_type)
    _print_shares("by layer", tuple(_alike(info.layers)))
    _print_shares("outside the layers", info.outside)


def _alike(layers: tuple[Share, ...]) -> Iterator[Share]:
    """Merges consecutive layers of equal size into one row."""
    for _, equal in groupby(layers, key=lambda layer: replace(layer, name="")):
        first, *others = equal
        yield replace(first, name=f"{first.name}-{others[-1].name}, each") if others else first


def _print_shares(title: str, shares: tuple[Share, ...]) -> None:
    if shares:
        print(f"\n{title}")
    for share in shares:
        name = printable(share.name)
        size = f"{share.parameters:15,} parameters {_mib(share.bytes)} {share.bits_per_weight:6.2f} bits each"
        print(f"  {name:24} {share.tensors:5} tensors {size}")


def _print_fit(fit: Fit) -> None:
    kv = ", ".join(f"{name} {size / 1024:.1f} KiB" for name, size in fit.kv_bytes_per_token.items())
    each = fit.layer_bytes
    print(f"  weights    {_mib(fit.weight_bytes)}, a layer {_mib(min(each)).strip()} to {_mib(max(each)).strip()}")
    states = f"; a state of the sequence {_mib(fit.state_bytes).strip()}" if fit.state_bytes else ""
    print(f"  a token of context: {kv}{states}; workspace {_mib(fit.workspace_bytes).strip()}")
    print(
        f"  sequences of {fit.context_length} tokens: {_mib(fit.least_bytes).strip()} in all for one sequence, "
        f"{_mib(fit.total_bytes).strip()} with the default KV memory for {fit.kv_tokens} tokens"
    )
    room = _mib(fit.available_bytes).strip()
    if fit.is_whole:
        print(f"  fits in {room}, with a context of up to {fit.most_context} tokens")
    else:
        longest = f"; all layers with a context of {fit.most_context} tokens" if fit.most_context else ""
        print(f"  in {room}: {fit.layers} of {len(each)} layers{longest}")


def _one_line(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _TEXT_WIDTH else f"{text[:_TEXT_WIDTH]}... ({len(text)} characters)"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:10,.2f} MiB"


def perplexity(
    model: LocalModel,
    text: Annotated[Path | None, Option("-f", "--file", metavar="TEXT", help="Text to evaluate (UTF-8).")] = None,
    context: Annotated[
        int | None, Option("-c", "--context", metavar="N", min=4, help="Number of tokens in a chunk. Default: 512.")
    ] = None,
    chunks: Chunks = None,
    base: Annotated[
        Path | None,
        Option("--kl-divergence-base", metavar="FILE", help="Write logits to FILE, or read them with --kl-divergence."),
    ] = None,
    compare: Annotated[
        bool,
        Option(
            "--kl-divergence", help="Compare MODEL with the logits in the --kl-divergence-base file, on the same text."
        ),
    ] = False,
    hellaswag: Annotated[
        Path | None,
        Option(
            "--hellaswag",
            metavar="FILE",
            help="Measure the accuracy on HellaSwag tasks instead. FILE has llama.cpp's format of six lines per task.",
        ),
    ] = None,
    tasks: Annotated[int | None, Option("--tasks", min=1, metavar="N", help="Use only the first N tasks.")] = None,
    threads: Threads = None,
    workers: Workers = 1,
    kv_type: KvTypeOption = None,
    device: Devices = [],  # noqa: B006  typer reads the default
    gpu_layers: GpuLayers = "auto",
    cpu_moe: CpuMoe = False,
    n_cpu_moe: NCpuMoe = None,
    override_tensors: OverrideTensors = [],  # noqa: B006
    endpoint: Endpoint = None,
    api_key_file: KeyFile = None,
    ca_file: CaFile = None,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text, as llama.cpp's llama-perplexity does; lower is better."""
    from llamaclust.cli.models.perplexity import Evaluation, Source, evaluate

    evaluation = Evaluation(text, context, chunks, base, compare, hellaswag, tasks)
    evaluation.check()
    gpus = Gpus(tuple(device), gpu_layers, None, cpu_moe, n_cpu_moe, tuple(override_tensors))
    source = Source(model, threads, workers, kv_type, endpoint, api_key_file, gpus, ca_file)
    evaluate(source, evaluation, as_json)
