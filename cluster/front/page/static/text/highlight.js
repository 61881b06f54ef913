// Colours for code: comments, texts, numbers and words that most languages reserve. One pass, in linear time.

const KEYWORDS = new Set(
  (
    "abstract and as assert async await begin bool boolean break case catch char class const continue def default defer del do double elif else " +
    "elsif end enum except export extends extern false final finally float fn for foreach from func function global go goto if impl implements " +
    "import in instanceof int interface is lambda let local long loop match mod module mut namespace new nil none nonlocal not null operator or " +
    "package pass print private protected pub public raise return select self short signed static string struct super switch template then this " +
    "throw throws trait true try type typedef typeof undefined union unless unsafe unsigned until use using var virtual void volatile when where " +
    "while with yield"
  ).split(" "),
);
const HASH_COMMENTS = /^(?:py|python|sh|bash|zsh|shell|rb|ruby|yaml|yml|toml|perl|pl|r|make|makefile|dockerfile|ini|conf|nix)$/i;
const DASH_COMMENTS = /^(?:sql|lua|haskell|hs|ada)$/i;
const SLASH_STRINGS = String.raw`"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|\x60(?:[^\x60\\]|\\[^])*\x60?`;
const LONG_STRINGS = String.raw`"""(?:[^"\\]|\\[^]|"(?!""))*(?:"""|$)|'''(?:[^'\\]|\\[^]|'(?!''))*(?:'''|$)`; // of Python, Kotlin, Swift, TOML
const MOST_CHARACTERS = 20_000; // a growing text is coloured anew with each frame

/** Parts of a code text as `{kind, text}`; `kind` is "" for plain text. */
export function highlight(code, language) {
  if (!language || language === "text" || code.length > MOST_CHARACTERS) return [{ kind: "", text: code }];
  const parts = [];
  let from = 0;
  for (const found of code.matchAll(patternOf(language))) {
    const kind = kindOf(found.groups);
    if (!kind) continue;
    if (found.index > from) parts.push({ kind: "", text: code.slice(from, found.index) });
    parts.push({ kind, text: found[0] });
    from = found.index + found[0].length;
  }
  parts.push({ kind: "", text: code.slice(from) });
  return parts.filter(({ text }) => text);
}

function patternOf(language) {
  let comment = String.raw`\/\/[^\n]*|\/\*(?:[^*]|\*(?!\/))*(?:\*\/)?`;
  if (HASH_COMMENTS.test(language)) comment = "#[^\\n]*";
  else if (DASH_COMMENTS.test(language)) comment = "--[^\\n]*";
  else if (/^(?:html|xml|svg|md|markdown)$/i.test(language)) comment = "<!--(?:[^-]|-(?!->))*(?:-->)?";
  return new RegExp(
    `(?<comment>${comment})|(?<string>${LONG_STRINGS}|${SLASH_STRINGS})|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_$][\\w$]*)`,
    "g",
  );
}

function kindOf({ comment, string, number, word }) {
  if (comment !== undefined) return "comment";
  if (string !== undefined) return "string";
  if (number !== undefined) return "number";
  return KEYWORDS.has(word) || KEYWORDS.has(word?.toLowerCase()) ? "keyword" : "";
}
