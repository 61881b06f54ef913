"""Recognizes the pre-tokenizer of a tokenizer.json by the way it splits a probe text."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from llamaclust.model.tokenizers.byte_pairs import splitter
from llamaclust.model.tokenizers.pre_tokenizers import known_pre_tokenizers

PROBE: Final = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nHello, world!  It's 3.14159; 1 22 333 4444 55555 666666 7777777 "
    "88888888 I've we'LL THEY'RE you'D can'T 'S''s don't! camelCaseWord HTMLParser XMLHttpRequest ABCdef "
    'snake_case_name __init__ kebab-case a+b=c x<y>z `tick` "quote" (paren) [bracket] {brace} a/b\\c #tag @you '
    "$9.99 50% ~!?... ---- ====== \r\n\r\nwindows\r\nlines   three  spaces\ttab\t\ttabs \u00a0nbsp\u3000wide "
    "naïve café Ünïcödé e\u0301a\u0300 straße ǅ ǲ ªº ⅷ ½ ²³ ٣٤٥ १२३४ ១២៣ "
    "Привет мир 12 Ещё раз, Ελληνικά λέξη שלום עולם مرحبا بالعالم، كيف؟ हिन्दी में नमस्ते। ภาษาไทย ไม่มีช่องว่าง "
    "កាន់តែពិសេស 中文字符测试，标点。我想在apple工作1314151天～ 日本語テスト ひらがな カタカナ 한국어 시험입니다. "
    "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 👩‍👩‍👧 ''''''```````\"\"\"\"......!!!!!!?????? «guillemets» "
    "“curly” ‘single’ — – • § ¶ € £ ¥ ^ | "
    "function(x){return x*2;}//comment\n\n\n    indented\n\tmore\n if(a&&b||!c) <tag attr='v'/> http://a.b/c?d=e&f=1 "
    "x\n/y \n//z !\n/a (\n) .\r\n/ end  "
)
"""The probe text. It has many scripts, upper and lower case, digits, combining marks, spaces and line ends."""

Pieces = tuple[str, ...]


def recognised(pre_tokenizer: Any, ignore_merges: bool, adds_bos: bool) -> str | None:
    """Returns the name of a known pre-tokenizer that splits the probe text like `pre_tokenizer`, or None. The known
    pre-tokenizer must have the same `ignore_merges`, and preferably the same `adds_bos`."""
    found = cut(pre_tokenizer)
    alike = [name for name, pieces in _known().items() if pieces == found]
    kinds = known_pre_tokenizers()
    exact = [name for name in alike if kinds[name].ignore_merges == ignore_merges]
    best = [name for name in exact if kinds[name].add_bos == adds_bos]
    return next(iter([*best, *exact]), None)


def cut(pre_tokenizer: Any) -> Pieces:
    return tuple(piece for piece, _ in pre_tokenizer.pre_tokenize_str(PROBE))


@cache
def _known() -> dict[str, Pieces]:
    return {name: cut(splitter(kind)) for name, kind in known_pre_tokenizers().items()}
