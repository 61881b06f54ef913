"""What it would cost to allow the properties of an object in any order: forced tokens, and the time of a step.

    python benchmarks/suites/property_order.py MODEL.gguf

The same objects by a JSON schema, which fixes the order, and by a parametric grammar of llguidance, which counts the
properties that came. The instances are in the schema's order, so both grammars take them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from llamaclust.core.sampling import Grammar
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary, read_vocabulary
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_WORDS = "name colour size weight price city street country owner maker year month day hour state kind"


@dataclass(frozen=True, slots=True)
class Walk:
    """An instance that a grammar took in."""

    tokens: int
    forced: int
    step_us: float  # median time to compute the allowed tokens


def schema(names: list[str]) -> Grammar:
    properties = {name: {"type": "string", "maxLength": 12} for name in names}
    whole = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    return definitions.of_schema(whole, "benchmark")


def any_order(names: list[str]) -> Grammar:
    """The same objects, their properties in any order and each once."""
    pairs = [
        rf'"\"{name}\"" SPACE? ":" SPACE? value SPACE? rest::set_bit({bit}) %if bit_clear({bit})'
        for bit, name in enumerate(names)
    ]
    rules = {
        "start": '"{" SPACE? first::0x0',
        "first::_": "\n | ".join(pairs),
        "rest::_": f'"}}" %if is_ones([0:{len(names)}])\n | ' + "\n | ".join(f'"," SPACE? {pair}' for pair in pairs),
        "value": '%json {"type": "string", "maxLength": 12}',
        "SPACE": r"/ |\n{1,2}[ \t]{0,20}/",
    }
    return definitions.of_lark("\n".join(f"{name}: {rule}" for name, rule in rules.items()), "benchmark")


def walk(grammar: Grammar, text: str, tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> Walk:
    """Takes in the tokens of a text; where the grammar forces tokens, those."""
    matcher = GrammarMatcher(grammar, vocabulary)
    tokens = forced = 0
    steps: list[float] = []
    rest = text.encode()
    while rest:
        taken = matcher.forced()
        forced += len(taken)
        if not taken:
            taken = tokenizer.encode_plain(rest.decode(), after_special=False)[:1]
            start = perf_counter()
            matcher.allowed()
            steps.append((perf_counter() - start) * 1e6)
            matcher.take(taken)
        tokens += len(taken)
        rest = rest.removeprefix(b"".join(vocabulary.words[token] for token in taken))
    return Walk(tokens, forced, median(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    tokenizer = load_tokenizer(open_model(parser.parse_args().model).metadata)
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocabulary_size)
    print("properties  order   tokens  forced  us a step")
    for count in (4, 8, 16):
        names = _WORDS.split()[:count]
        text = json.dumps({name: f"{name} {place}" for place, name in enumerate(names)})
        for label, grammar in (("schema", schema(names)), ("any", any_order(names))):
            made = walk(grammar, text, tokenizer, vocabulary)
            print(f"{count:10}  {label:6} {made.tokens:7}  {made.forced:6}  {made.step_us:9.0f}")


if __name__ == "__main__":
    main()
