"""Maps commands of other programs (Ollama, Docker, llama.cpp, package managers) to llamaclust's commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

_CHAT = "llamaclust up {0}`, then `llamaclust chat"
_PULL = "llamaclust model pull {0}"
_REMOVE = "llamaclust model rm {0}"
_INFO = "llamaclust model info {0}"
_STOP = "llamaclust down"
_UP = "llamaclust up {0}"
_MODEL = "MODEL"
_COMMANDS: dict[str, dict[str, str]] = {
    "llamaclust": {
        **dict.fromkeys(("run", "cli", "repl", "ask"), _CHAT),
        **dict.fromkeys(("serve", "server", "start", "launch", "load", "deploy"), _UP),
        **dict.fromkeys(("ps", "stats", "info", "health"), "llamaclust status"),
        **dict.fromkeys(("top", "watch"), "llamaclust status --watch"),
        **dict.fromkeys(("list", "ls", "models", "search"), "llamaclust model list"),
        **dict.fromkeys(("pull", "download", "get", "install", "fetch"), _PULL),
        **dict.fromkeys(("rm", "remove", "delete", "uninstall"), _REMOVE),
        **dict.fromkeys(("show", "inspect"), _INFO),
        **dict.fromkeys(("stop", "kill", "shutdown", "unload", "quit", "exit"), _STOP),
        "restart": "llamaclust down`, then `llamaclust up",
        "create": "llamaclust up FILE` with settings in a cluster file, or `llamaclust model convert",
        **dict.fromkeys(("join", "node", "agent", "connect"), "llamaclust worker --join HOST"),
        **dict.fromkeys(("complete", "completion", "prompt"), "llamaclust generate PROMPT"),
        **dict.fromkeys(("benchmark", "perf"), "llamaclust bench {0}"),
        "version": "llamaclust --version",
        "help": "llamaclust --help",
    },
    "llamaclust model": {
        **dict.fromkeys(("download", "get", "install", "fetch", "add"), _PULL),
        **dict.fromkeys(("remove", "delete", "uninstall"), _REMOVE),
        **dict.fromkeys(("ls", "search", "ps"), "llamaclust model list"),
        **dict.fromkeys(("show", "inspect"), _INFO),
        **dict.fromkeys(("run", "chat"), _CHAT),
        **dict.fromkeys(("serve", "load", "start"), _UP),
    },
    "llamaclust keys": {
        **dict.fromkeys(("create", "new", "make", "generate"), "llamaclust keys add"),
        **dict.fromkeys(("delete", "remove", "revoke"), "llamaclust keys rm NAME"),
        **dict.fromkeys(("ls", "show"), "llamaclust keys list"),
    },
    "llamaclust token": dict.fromkeys(("new", "create", "renew", "add"), "llamaclust token rotate"),
    "llamaclust model cache": {
        "ls": "llamaclust model cache list",
        **dict.fromkeys(("rm", "remove", "delete", "prune", "clean"), "llamaclust model cache clear"),
    },
}
WITHOUT_ARGUMENT = {
    "chat": "`llamaclust up {0}`, then `llamaclust chat`; or `llamaclust chat --model {0}`, without a cluster",
    "generate": "put a prompt of several words in quotes, and name a model by --model",
    "status": "`llamaclust status --cluster {0}`",
    "down": "`llamaclust down --cluster {0}`",
    "worker": "`llamaclust worker --join {0}`",
}
_MOST_SHOWN = 100


def instead_of(group: str, words: Sequence[str], commands: Mapping[str, object]) -> str | None:
    """Returns advice about an unknown command, or None if there is no advice. `words` are the unknown command and its
    arguments. `commands` are the known commands of `group`."""
    word, *more = words
    known = _COMMANDS.get(group, {}).get(word)
    if known is None:
        inside = [name for name, each in commands.items() if word in getattr(each, "commands", ())]
        known = f"{group} {inside[0]} {word}" if len(inside) == 1 else None
    if known is None:
        return None
    argument = next((each for each in more if not each.startswith("-")), _MODEL)
    return f"there is no command {word[:_MOST_SHOWN]!r}: use `{known.format(_shown(argument))}`"


def without_argument(command: str, word: str) -> str:
    shown = _shown(word)
    return f"{command} does not take {shown}: {WITHOUT_ARGUMENT[command].format(shown)}"


def _shown(word: str) -> str:
    return shlex.quote(" ".join(word.split())[:_MOST_SHOWN])
