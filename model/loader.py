"""A model that can be run: its programs, with their tensors and costs, its tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from itertools import dropwhile
from pathlib import Path
from typing import Self

from llamaclust.core.errors import ModelFileError
from llamaclust.model.adapters import adapted, check_adapter_weights, read_adapter, unread_adapter_tensor, with_adapters
from llamaclust.model.architectures import as_programs_read, build_program
from llamaclust.model.architectures.tensors import FACTOR_TENSORS, FACTORS, LONG_FACTORS, idle_kv_tensors, nextn_tensors
from llamaclust.model.chat.template import ChatTemplate, load_chat_template
from llamaclust.model.chat.template_choice import chosen_template
from llamaclust.model.costs import (
    JOINED,
    LayerCost,
    ModelCosts,
    all_macs,
    file_bytes,
    float_macs,
    is_before_head,
    layer_cost,
    typed_weights,
    weight_bytes,
)
from llamaclust.model.expert_shards import divided_program, mixture_of
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.values import shown
from llamaclust.model.groups.costs import GroupCosts
from llamaclust.model.hyperparameters import Hyperparameters
from llamaclust.model.kv_type import KvType
from llamaclust.model.model_keys import ModelKeys, read_hyperparameters
from llamaclust.model.pooling import DEFAULT, Pooling, read_pooling
from llamaclust.model.program import Program, weights_of
from llamaclust.model.projectors.projector import Projector, open_projector
from llamaclust.model.quant_types import WIDER_TILES, QuantType
from llamaclust.model.ranking import Ranking, read_ranking
from llamaclust.model.shard_names import whole_name
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer


class Model:
    """An opened model file. Tensors that no step reads are refused, because they may scale results."""

    def __init__(
        self,
        file: ModelFile,
        chat_template: str | None = None,
        adapters: Mapping[int, ModelFile] | None = None,
        projector: Projector | None = None,
    ) -> None:
        """Creates a model. Raises ModelFileError for an unsupported architecture or a projector that does not fit."""
        self.plain = as_programs_read(file)
        self.adapters = adapters or {}
        self.file = file = with_adapters(self.plain, self.adapters)
        self._chosen_template = None if chat_template is None else chosen_template(chat_template)
        self.hyperparameters: Hyperparameters = read_hyperparameters(file)
        self._whole = self.program(0, self.layer_count)
        self._costs: dict[tuple[KvType, int], ModelCosts] = {}
        self._group_costs: dict[tuple[KvType, int], GroupCosts] = {}
        self._layer_programs: dict[KvType, list[Program]] = {}
        self.pooling = read_pooling(file, DEFAULT if self.is_causal else Pooling.MEAN)
        self._refuse_unknown_tensors()
        self._refuse_other_uses()
        self.projector = projector
        if projector is not None:
            self.check_projector(projector)

    @classmethod
    def open(
        cls,
        path: Path | str,
        chat_template: str | None = None,
        adapters: Sequence[Path] = (),
        mmproj: Path | None = None,
    ) -> Model:
        """Opens a model. Reads all bytes of `adapters`, but only the headers of `path` and `mmproj`. `chat_template` is
        the name or the path of a template that replaces the file's template. `mmproj` is the projector's file. Raises
        UsageError if the template does not exist. Raises ModelFileError if a file is invalid or does not fit the
        model."""
        plain = open_model(path)
        numbered = {number: read_adapter(adapter, plain) for number, adapter in enumerate(adapters)}
        check_adapter_weights(numbered.values())
        return cls(plain, chat_template, numbered, None if mmproj is None else open_projector(mmproj))

    def adapted_by(self, adapters: Mapping[int, ModelFile]) -> Model:
        if adapters == self.adapters:
            return self
        adapted = Model(self.plain, adapters=adapters, projector=self.projector)
        adapted._chosen_template = self._chosen_template
        return adapted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def has_wider_tiles(self) -> bool:
        tensors = self.file.tensors.values()
        return any(tensor.quant_type in WIDER_TILES and tensor.packed_as is None for tensor in tensors)

    @cached_property
    def widened(self) -> Model:
        """The same model, with weights packed as wider tiles where the quant type allows it (`WIDER_TILES`)."""
        wide = copy(self)
        tensors = self.file.tensors.items()
        wide.file = replace(
            self.file,
            tensors={name: replace(tensor, packed_as=WIDER_TILES.get(tensor.quant_type)) for name, tensor in tensors},
        )
        wide._costs, wide._group_costs = {}, {}
        return wide

    @property
    def model_id(self) -> str:
        return self.file.identity

    @property
    def layer_count(self) -> int:
        return self.hyperparameters.block_count

    @property
    def short_rope_context(self) -> int | None:
        """The longest context that takes the file's RoPE factors for short contexts. None if all contexts take the same
        factors."""
        if LONG_FACTORS not in self.file.tensors or FACTORS in self.file.tensors:
            return None
        return self.hyperparameters.rope.original_context_length

    def program(
        self,
        start: int,
        end: int,
        kv_type: KvType = KvType.F16,
        context_tokens: int | None = None,
        expert_shards: int = 1,
    ) -> Program:
        """Returns the program of layers [start, end). `context_tokens` is the maximum sequence length. None means the
        model's context length. With several `expert_shards`, start and end count parts of layers (see `Program`).
        Raises UsageError if a layer cannot be divided into so many parts."""

        def build(first: int, last: int) -> Program:
            return adapted(build_program(self.file, first, last, kv_type, context_tokens), self.file)

        return build(start, end) if expert_shards == 1 else divided_program(build, start, end, expert_shards)

    def is_divisible(self, layer: int, expert_shards: int) -> bool:
        mixture = mixture_of(self._whole.steps, layer)
        return mixture is not None and mixture.experts >= expert_shards

    @property
    def adapter_digests(self) -> dict[int, str]:
        return {number: adapter.identity for number, adapter in self.adapters.items()}

    @property
    def window(self) -> int | None:
        return self._whole.window

    @property
    def quant_types(self) -> tuple[QuantType, ...]:
        return self.costs(KvType.F16).quant_types

    @property
    def has_states(self) -> bool:
        return self._whole.has_states

    @property
    def is_causal(self) -> bool:
        """False for an encoder, which computes each prompt as a whole."""
        return self._whole.is_causal

    @property
    def generates(self) -> bool:
        return self._whole.has_logits

    @property
    def embedding_width(self) -> int:
        """The number of floats in an embedding, or the number of scores of a reranker."""
        return (self._whole.normed or self._whole.hidden).width

    @property
    def image_width(self) -> int:
        """The number of floats in an image row, which replaces a token's embedding. 0 if the model reads no images."""
        return self._whole.given_levels * self.hyperparameters.embedding_length

    def check_projector(self, projector: Projector) -> None:
        """Raises ModelFileError if the model reads no images, or if the projector does not fit it."""
        which = f"{projector.file.path}: the projector cannot be used with {self.file.path.name}, because"
        if not self.image_width:
            what = f"images for architecture {self.hyperparameters.architecture} are not supported"
            raise ModelFileError(f"{which} {what}; set 'mmproj: off'")
        projector.check_text_model(self.plain, self.hyperparameters)
        if projector.family.sections and not self.rope_sections:
            what = "images need the key rope.dimension_sections, which the model lacks"
            raise ModelFileError(f"{which} {what}; convert the model again")

    @property
    def rope_sections(self) -> int:
        return self._whole.rope_sections

    @cached_property
    def ranking(self) -> Ranking | None:
        if self.pooling is not Pooling.RANK:
            return None
        with _named(self.file.path):
            return read_ranking(self.file.metadata, self.tokenizer, of_last=self.is_causal)

    @property
    def hidden_bytes(self) -> int:
        return 4 * self.program(0, 1).out.width if self.layer_count > 1 else 0

    def tensors_for(self, program: Program) -> dict[str, Tensor]:
        return {name: self.file.tensor(whole_name(name)).shard(name) for name in program.weights}

    def costs(self, kv_type: KvType, expert_shards: int = 1) -> ModelCosts:
        key = kv_type, expert_shards
        if key not in self._costs:
            self._costs[key] = self._computed_costs(*key)
        return self._costs[key]

    def _computed_costs(self, kv_type: KvType, expert_shards: int) -> ModelCosts:
        tensors = self.file.tensors
        embedding = [step for step in self._whole.steps if step.is_embedding]
        head = list(dropwhile(partial(is_before_head, self._whole), self._whole.steps))
        layers = [self.program(layer, layer + 1, kv_type) for layer in range(self.layer_count)]
        parts = [list(self._parts(layer, expert_shards)) for layer in layers]
        costs = [
            self._part_costs(layer, of_layer, expert_shards) for layer, of_layer in zip(layers, parts, strict=True)
        ]
        return ModelCosts(
            embedding_bytes=weight_bytes(tensors, embedding),
            head_bytes=weight_bytes(tensors, head),
            head_macs=all_macs(head),
            layers=tuple(cost for of_layer in costs for cost in of_layer),
            float_head_macs=float_macs(tensors, head),
            head_file_bytes=weight_bytes(tensors, head, file_bytes),
            hidden_bytes=self.hidden_bytes,
            cut_bytes=max((4 * part.hidden.width for _, *others in parts for part in others), default=0),
            expert_shards=expert_shards,
            head_weights=typed_weights(tensors, head, experts=False),
            tied_bytes=sum(tensors[name].resident_bytes for name in {*weights_of(embedding)} & {*weights_of(head)}),
        )

    def group_costs(self, kv_type: KvType, members: int) -> GroupCosts:
        key = kv_type, members
        if key not in self._group_costs:
            if kv_type not in self._layer_programs:
                layers = range(self.layer_count)
                self._layer_programs[kv_type] = [self.program(layer, layer + 1, kv_type) for layer in layers]
            programs = self._layer_programs[kv_type]
            self._group_costs[key] = GroupCosts.of(self.costs(kv_type), programs, self.tensors_for, members)
        return self._group_costs[key]

    def _parts(self, layer: Program, shards: int) -> Iterator[Program]:
        if shards == 1 or not self.is_divisible(layer.start, shards):
            yield layer
            return
        first = layer.start * shards
        yield from (divided_program(lambda *_: layer, part, part + 1, shards) for part in range(first, first + shards))

    def _part_costs(self, layer: Program, parts: Sequence[Program], shards: int) -> list[LayerCost]:
        costs = [layer_cost(self.tensors_for(part), part) for part in parts]
        if len(parts) == 1:
            return [*costs, *[JOINED] * (shards - 1)]
        whole_bytes = layer_cost(self.file.tensors, layer).weight_bytes
        saved_bytes = sum(cost.weight_bytes for cost in costs) - whole_bytes
        return [replace(costs[0], saved_bytes=saved_bytes), *costs[1:]]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, created on first use. Raises ModelFileError if the file has no supported tokenizer."""
        with _named(self.file.path):
            return load_tokenizer(self.file.metadata)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, created on first use. `close` ends its processes. May raise ModelFileError."""
        tokenizer = self.tokenizer
        with _named(self.file.path):
            return load_chat_template(self.file.metadata, tokenizer, chosen=self._chosen_template)

    def close(self) -> None:
        if "chat_template" in vars(self):
            self.chat_template.close()

    def _refuse_other_uses(self) -> None:
        keys = ModelKeys(self.file)
        if not self._whole.kv_memory:
            what = f"none of the model's {self.layer_count} layers has attention or a state"
            raise self.file.error("general.architecture", f"{keys.architecture}, but {what}")
        if self.generates and self.pooling is Pooling.RANK:
            raise keys.error("pooling_type", "4 (rank) is supported only for encoders and qwen3")
        if keys.flag("attention.causal", self.is_causal) != self.is_causal:
            raise keys.error("attention.causal", f"{not self.is_causal} is not supported")

    def _refuse_unknown_tensors(self) -> None:
        known = {*self._whole.weights, *FACTOR_TENSORS, *nextn_tensors(self.file), *idle_kv_tensors(self.file)}
        unknown = set(self.file.tensors) - known
        if (error := unread_adapter_tensor(self.file, unknown)) is not None:
            raise error
        if unknown:
            what = f"the tensor is not part of architecture {self.hyperparameters.architecture} as it is known here"
            raise ModelFileError(f"{self.file.path}: tensor {shown(min(unknown))}: {what}; use another model")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
