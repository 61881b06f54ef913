"""Runs `model perplexity`. Progress goes to standard error, figures go to standard output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llamaclust.cli.generate import connect
from llamaclust.cli.interrupts import ends_workers_cleanly
from llamaclust.cli.options import NO_GPUS, Gpus
from llamaclust.cli.progress import step_bar
from llamaclust.cluster.client.base import TextClient
from llamaclust.core.errors import UsageError
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.tools.evaluate.perplexity import Perplexity, check_same_model, cut, measure, read_text
from llamaclust.wire.rpc.grpc_options import tune_grpc

if TYPE_CHECKING:
    from llamaclust.cluster.client.local import LocalClient
    from llamaclust.tools.evaluate.hellaswag import Accuracy
    from llamaclust.tools.evaluate.kl_divergence import Divergence, Estimate

_CONTEXT: Final = 512


@dataclass(frozen=True, slots=True)
class Evaluation:
    text: Path | None
    context: int | None
    chunks: int | None
    base: Path | None
    compare: bool
    hellaswag: Path | None
    tasks: int | None

    def check(self) -> None:
        """Raises UsageError if the options contradict each other."""
        if self.tasks is not None and self.hellaswag is None:
            raise UsageError("--tasks is for --hellaswag")
        if self.compare and self.base is None:
            raise UsageError("--kl-divergence needs --kl-divergence-base FILE, a file of logits to compare with")
        given = {"-f": self.text, "-c": self.context, "--chunks": self.chunks, "--kl-divergence-base": self.base}
        if self.hellaswag is not None:
            self._refuse(given, "--hellaswag reads whole tasks from its own FILE")
        elif self.compare:
            self._refuse(
                {"-f": self.text, "-c": self.context}, "--kl-divergence takes the text and chunks from its FILE"
            )
        elif self.text is None:
            raise UsageError("there is no text to evaluate: give -f TEXT")

    def _refuse(self, options: Mapping[str, object], why: str) -> None:
        for name, value in options.items():
            if value is not None:
                raise UsageError(f"{why}: remove {name}")


@dataclass(frozen=True, slots=True)
class Source:
    """The place where the model runs: this process, worker processes on this machine, or a running cluster."""

    model: Path
    threads: int | None
    workers: int
    kv_type: KvType | None
    endpoint: str | None
    api_key_file: Path | None
    gpus: Gpus = NO_GPUS
    ca_file: Path | None = None

    def tokenizer(self) -> Tokenizer:
        with closing(Model.open(self.model)) as model:
            return model.tokenizer

    @contextmanager
    def opened(self, tokenizer: Tokenizer, sample: str, context: int, sequences: int = 1) -> Iterator[TextClient]:
        """Opens a client. Raises UsageError if options contradict each other or the cluster serves another model."""
        with ends_workers_cleanly(self.workers), self._open(context, sequences) as client:
            if self.endpoint is not None:
                check_same_model(client, tokenizer, sample)
            yield client

    def local(self, context: int, sequences: int = 1) -> LocalClient:
        """Loads the model in this process. Raises UsageError if options select worker processes or a cluster."""
        if self.endpoint is not None or self.workers > 1:
            raise UsageError("logits need a model in this process: remove --endpoint and --workers")
        self._check_no_endpoint()
        from llamaclust.cluster.client.local import LocalClient
        from llamaclust.cluster.launchers.in_process import LocalSettings

        device, gpu_layers, _ = self.gpus.parsed
        settings = LocalSettings(
            context_length=context,
            max_sequences=sequences,
            prefix_cache=sequences > 1,
            kv_blocks=sequences * (context // 16 + 2),
            kv_type=self.kv_type or KvType.F16,
            device=device,
            gpu_layers=gpu_layers,
            cpu_moe=self.gpus.cpu_moe,
            placement=self.gpus.placement,
        )
        return LocalClient(self.model, self.threads, settings=settings)

    def _check_no_endpoint(self) -> None:
        for option, value in (("--api-key-file", self.api_key_file), ("--ca-file", self.ca_file)):
            if value is not None:
                raise UsageError(f"{option} is for --endpoint")

    def _open(self, context: int, sequences: int) -> TextClient:
        if self.gpus != NO_GPUS and (self.endpoint is not None or self.workers > 1):
            options = "--device and --gpu-layers"
            raise UsageError(f"{options} are for a model in this process: remove --endpoint and --workers")
        if self.endpoint is not None:
            if self.workers > 1 or self.threads is not None or self.kv_type is not None:
                given = "--workers, --threads and --kv-type"
                raise UsageError(f"--endpoint uses a cluster that already runs: remove {given}")
            return connect(self.endpoint, self.api_key_file, self.ca_file)
        self._check_no_endpoint()
        if self.workers == 1:
            return self.local(context, sequences)
        tune_grpc()
        from llamaclust.cluster.client.local import ServiceClient
        from llamaclust.tools.bench.temporary_cluster import cluster_service

        kv_type = self.kv_type or KvType.F16
        return ServiceClient(cluster_service(self.model, self.workers, self.threads, context, kv_type))


def evaluate(source: Source, evaluation: Evaluation, as_json: bool) -> None:
    if evaluation.hellaswag is not None:
        accuracy = _hellaswag(source, evaluation.hellaswag, evaluation.tasks)
        _print(accuracy.as_json(), [_shown_accuracy(accuracy)], as_json)
    elif evaluation.compare:
        assert evaluation.base is not None
        divergence = _divergence(source, evaluation.base, evaluation.chunks)
        _print(divergence.as_json(), _shown_divergence(divergence), as_json)
    else:
        assert evaluation.text is not None
        context = evaluation.context or _CONTEXT
        result = _perplexity(source, read_text(evaluation.text), context, evaluation.chunks, evaluation.base)
        _print(result.as_json(), [_shown_perplexity(result, context)], as_json)


def _print(value: Mapping[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(value) if as_json else "\n".join(lines))


def _perplexity(source: Source, text: str, context: int, most: int | None, base: Path | None) -> Perplexity:
    tokenizer = source.tokenizer()
    chunks = cut(tokenizer, text, context, most)
    with step_bar("perplexity", len(chunks)) as show:

        def on_chunk(value: Perplexity) -> None:
            show(value.chunks, f"perplexity {value.perplexity:.4f}")

        if base is None:
            with source.opened(tokenizer, text, context) as client:
                return measure(client, chunks, on_chunk)
        from llamaclust.tools.evaluate.logit_scores import keep_logits

        with source.local(context) as local:
            return keep_logits(local, chunks, base, on_chunk)


def _divergence(source: Source, base: Path, most: int | None) -> Divergence:
    from llamaclust.tools.evaluate.logit_scores import measure_divergence
    from llamaclust.tools.evaluate.logits_file import LogitsFile

    kept, tokenizer = LogitsFile.open(base), source.tokenizer()
    chunks = min(most or kept.shape.chunks, kept.shape.chunks)
    with step_bar("KL divergence", chunks) as show, source.local(kept.shape.context) as client:

        def on_chunk(done: int, mean: float) -> None:
            show(done, f"KL divergence {mean:.6f}")

        return measure_divergence(client, tokenizer, kept, chunks, on_chunk)


def _hellaswag(source: Source, file: Path, most: int | None) -> Accuracy:
    from llamaclust.tools.evaluate.hellaswag import AT_ONCE, measure_hellaswag, read_tasks

    tokenizer = source.tokenizer()
    tasks = read_tasks(file, tokenizer, most)
    context = max(len(ending) for task in tasks for ending in task.endings)
    sample = tokenizer.decode(tasks[0].endings[0], skip_special=True)
    with step_bar("acc_norm", len(tasks)) as show, source.opened(tokenizer, sample, context, AT_ONCE) as client:

        def on_task(value: Accuracy) -> None:
            show(value.tasks, f"acc_norm {100 * value.acc_norm:.2f} %")

        return measure_hellaswag(client, tasks, on_task)


def _shown_perplexity(result: Perplexity, context: int) -> str:
    return f"perplexity {result.perplexity:.4f} +/- {result.stderr:.4f} ({result.chunks} chunks of {context} tokens)"


def _shown_accuracy(value: Accuracy) -> str:
    low, high = value.acc_norm_range
    share = f"acc_norm {100 * value.acc_norm:.2f} % (95 %: {100 * low:.2f} to {100 * high:.2f})"
    return f"{share}, acc {100 * value.acc:.2f} %, {value.tasks} tasks"


def _shown_divergence(found: Divergence) -> list[str]:
    quantiles, differences = found.kld_quantiles, found.p_difference_quantiles
    return [
        f"{found.chunks} chunks, {found.tokens} tokens",
        "",
        _line("Mean PPL(Q)", found.perplexity),
        _line("Mean PPL(base)", found.base_perplexity),
        f"{'Cor(ln(PPL(Q)), ln(PPL(base)))':32}{100 * found.correlation:12.2f} %",
        _line("Mean ln(PPL(Q)/PPL(base))", found.log_ratio),
        _line("Mean PPL(Q)/PPL(base)", found.log_ratio.exp()),
        _line("Mean PPL(Q)-PPL(base)", found.difference),
        "",
        _line("Mean KLD", found.kld),
        *(f"{name.capitalize() + ' KLD':32}{value:12.6f}" for name, value in quantiles.items()),
        "",
        _line("Mean Δp", found.p_difference, percent=True),
        *(f"{name.capitalize() + ' Δp':32}{100 * value:12.3f} %" for name, value in differences.items()),
        _line("RMS Δp", found.p_difference_rms, percent=True),
        _line("Same top p", found.same_top, percent=True),
    ]


def _line(name: str, estimate: Estimate, percent: bool = False) -> str:
    if percent:
        return f"{name:32}{100 * estimate.value:12.3f} +/- {100 * estimate.stderr:.3f} %"
    return f"{name:32}{estimate.value:12.6f} +/- {estimate.stderr:.6f}"
