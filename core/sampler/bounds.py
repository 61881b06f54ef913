"""Bounds of sampling parameters, grammars and drafts."""

MAX_VOCABULARY = 1 << 20
MAX_CONTEXT_TOKENS = 1 << 20  # Maximum number of tokens in a sequence, and in the windows of penalties.
MAX_TOP_K = (1 << 31) - 1
MAX_PENALTY = 1000.0
MAX_BIAS = 1e9  # Maximum number added to a logit. It makes a token certain or impossible.

MAX_LOGIT_BIASES = 1024
MAX_MU = 1e12
MAX_BREAKERS = 1 << 16  # Maximum number of DRY sequence breakers of a request, as token sequences.
MAX_BREAKER_TOKENS = 64  # Maximum number of tokens in one breaker.
# Maximum number of tokens in all breakers of a request. They may be sent to the last stage for each token.
MAX_BREAKERS_TOKENS = 1 << 15
MAX_GRAMMAR_BYTES = 1 << 20
# Maximum product of a grammar's numbers of rules and characters. Converting such a grammar takes about a second.
MAX_GBNF_WORK = 1 << 25
MAX_TRIGGERS = 64
MAX_TRIGGER_BYTES = 1024
MAX_FORCED_TOKENS = 64  # Maximum number of forced tokens that follow one sampled token.
MAX_DRAFTED_TOKENS = 32  # Maximum number of tokens that an MTP head drafts after one sampled token.
MAX_MATCHER_NS = 60_000_000_000  # Maximum CPU time of a row's matcher. Answers fail long before.
MAX_REASONING_END_TOKENS = 1 << 14  # Maximum number of tokens that end reasoning when its budget is used up.
