"""Pre-tokenizers, which split text into words before byte pairs are merged. `tokenizer.ggml.pre` has their names. The
regular expressions are those of the models' own tokenizers. Each one splits the pieces that the previous one made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from llamaclust.core.errors import ModelFileError


def _ranges(spans: str) -> str:
    return "".join("-".join(chr(int(end, 16)) for end in span.split("-")) for span in spans.split())


_CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ONE: Final = r"[^\r\n\p{L}\p{N}]?"

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3: Final = rf"{_CONTRACTION}|{_ONE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2: Final = rf"{_CONTRACTION}|{_ONE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN35: Final = rf"{_CONTRACTION}|{_ONE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
_TEKKEN: Final = rf"{_ONE}{_UPPER}*{_LOWER}+|{_ONE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_GPT4O: Final = (
    rf"{_ONE}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_ONE}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_NOT_HAN: Final = r"&&[^\p{Han}]"
_KIMI_UPPER: Final = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]"
_KIMI_LOWER: Final = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]"
_KIMI: Final = (
    rf"\p{{Han}}+|{_ONE}{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTION}?|{_ONE}{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_SEED_CODER: Final = rf"{_CONTRACTION}|{_ONE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
_BAILING: Final = rf"'(?i:[sdmt]|ll|ve|re)|{_ONE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_BLOOM: Final = r" ?[^(\s|.,!?…。，、।۔،)]+"

_ASCII_MARKS: Final = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3: Final = (
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_DEEPSEEK_CJK: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTER_RANGES: Final = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
"""The cased letters in DeepSeek's tokenizer, as code points, because Unicode normalization of this file would merge
some letters."""
_DEEPSEEK_LETTERS: Final = rf"\s?[{_ranges(_DEEPSEEK_LETTER_RANGES)}]+"
_DEEPSEEK_MARKS: Final = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Regular expressions that split text into words. If `ignore_merges`, words in the vocabulary stay whole. `add_bos`
    applies to files without the key `add_bos_token`."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_DIGITS_APART: Final = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN: Final = PreTokenizer((_GPT2,))
_LLAMA_BPE: Final = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_DEEPSEEK_V3: Final = PreTokenizer((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3))

_FAMILIES: Final[tuple[tuple[str, PreTokenizer], ...]] = (
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA_BPE),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert "
        "jina-v1-en jina-v2-code jina-v2-es jina-v2-de jina-es jina-de roberta-bpe",
        _PLAIN,
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _DIGITS_APART),
    ("qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan grok-2 solar-open kormo f2llmv2", PreTokenizer((_QWEN2,))),
    ("qwen35", PreTokenizer((_QWEN35,))),
    ("deepseek-llm", PreTokenizer(("[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_MARKS, r"\s+$", _DEEPSEEK_CJK, r"\p{N}+"))),
    ("deepseek-coder", PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm", _DEEPSEEK_V3),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 minimax-m2", PreTokenizer((_GPT4O,))),
    ("kimi-k2", PreTokenizer((_KIMI,))),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("seed-coder", PreTokenizer((_SEED_CODER,))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _QWEN2), ignore_merges=True)),
)

_BY_NAME: Final = {name: kind for names, kind in _FAMILIES for name in names.split()}


def known_pre_tokenizers() -> Mapping[str, PreTokenizer]:
    return {names.split()[0]: kind for names, kind in _FAMILIES}


def pre_tokenizer(name: str) -> PreTokenizer:
    found = _BY_NAME.get(name)
    if found is None:
        raise ModelFileError(
            f"tokenizer.ggml.pre: unknown pre-tokenizer {ascii(name)[:66]}; supported: {', '.join(_BY_NAME)}"
        )
    return found
