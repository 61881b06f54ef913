"""Coding agents: how each is started with llamaclust, and the calls that a recording scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

API: Final = "http://127.0.0.1:8080"
"""The address that docs show; a recording has its own."""
MODEL: Final = "my-model"
"""Stands for the model's name."""
PROMPT: Final = "Read a.txt"

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Agent:
    title: str
    path: str  # Path of the API that the agent uses.
    command: str  # Shell command with environment variables, which sends `PROMPT`.
    calls: tuple[Call, ...]  # Calls that the scripted answers make, one in each answer.
    files: Mapping[str, str] = field(default_factory=dict)  # Configuration by path in the home folder.
    plain: str = "Done."  # The answer to a prompt without tools.


_CHAT, _RESPONSES, _MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
_CODEX: Final[tuple[Call, ...]] = (
    ("exec_command", {"cmd": "cat a.txt"}),
    ("view_image", {"path": "p.png"}),
    ("multi_agent_v1__wait_agent", {"targets": []}),
)
_CODEX_TOML: Final = f"""\
model = "{MODEL}"
model_provider = "llamaclust"

[model_providers.llamaclust]
name = "llamaclust"
base_url = "{API}/v1"
"""
_OPENCODE_JSON: Final = f"""\
{{
  "model": "llamaclust/{MODEL}",
  "provider": {{
    "llamaclust": {{
      "npm": "@ai-sdk/openai-compatible",
      "options": {{"baseURL": "{API}/v1"}},
      "models": {{"{MODEL}": {{}}}}
    }}
  }}
}}
"""
_PI_JSON: Final = f"""\
{{
  "providers": {{
    "llamaclust": {{
      "baseUrl": "{API}/v1",
      "api": "openai-completions",
      "apiKey": "none",
      "models": [{{"id": "{MODEL}"}}]
    }}
  }}
}}
"""
_VIBE_TOML: Final = f"""\
active_model = "{MODEL}"

[[providers]]
name = "llamaclust"
api_base = "{API}/v1"
api_key_env_var = ""

[[models]]
name = "{MODEL}"
alias = "{MODEL}"
provider = "llamaclust"
"""
_OPENCODE: Final[tuple[Call, ...]] = (
    ("bash", {"command": "cat a.txt", "description": "x"}),
    ("read", {"filePath": "p.png"}),
)

AGENTS: Final[Mapping[str, Agent]] = {
    "codex": Agent("Codex", _RESPONSES, f'codex exec "{PROMPT}"', _CODEX, {".codex/config.toml": _CODEX_TOML}),
    "codex-oss": Agent(
        "Codex --oss",
        _RESPONSES,
        f'CODEX_OSS_BASE_URL={API}/v1 codex exec --oss --local-provider ollama -m {MODEL} "{PROMPT}"',
        _CODEX,
    ),
    "claude-code": Agent(
        "Claude Code",
        _MESSAGES,
        f'ANTHROPIC_BASE_URL={API} ANTHROPIC_AUTH_TOKEN=none ANTHROPIC_MODEL={MODEL} claude -p "{PROMPT}"',
        (
            ("Bash", {"command": "cat a.txt"}),
            ("Read", {"file_path": "p.png"}),
            ("ToolSearch", {"query": "select:WebSearch,NotebookEdit", "max_results": 5}),
            ("WebSearch", {"query": "pandas"}),
        ),
    ),
    "opencode": Agent(
        "OpenCode", _CHAT, f'opencode run "{PROMPT}"', _OPENCODE, {".config/opencode/opencode.json": _OPENCODE_JSON}
    ),
    "kilo": Agent(
        "Kilo Code CLI", _CHAT, f'kilo run "{PROMPT}"', _OPENCODE, {".config/kilo/kilo.json": _OPENCODE_JSON}
    ),
    "qwen-code": Agent(
        "Qwen Code",
        _CHAT,
        f'OPENAI_BASE_URL={API}/v1 OPENAI_API_KEY=none OPENAI_MODEL={MODEL} qwen --auth-type openai -p "{PROMPT}"',
        (("read_file", {"file_path": "PROJECT/a.txt"}),),
    ),
    "pi": Agent(
        "Pi",
        _CHAT,
        f'pi --provider llamaclust --model {MODEL} -p "{PROMPT}"',
        (("bash", {"command": "cat a.txt"}),),
        {".pi/agent/models.json": _PI_JSON},
    ),
    "copilot": Agent(
        "GitHub Copilot CLI",
        _CHAT,
        f"COPILOT_OFFLINE=true COPILOT_PROVIDER_BASE_URL={API}/v1 COPILOT_MODEL={MODEL} "
        f'copilot --allow-all-tools -p "{PROMPT}"',
        (("bash", {"command": "cat a.txt", "description": "x"}),),
    ),
    "cline": Agent(
        "Cline CLI",
        _CHAT,
        f'cline auth -p openai -k none -m {MODEL} -b {API}/v1 && cline "{PROMPT}"',
        (("read_files", {"files": ["a.txt"]}),),
    ),
    "vibe": Agent(
        "Mistral Vibe",
        _CHAT,
        f'vibe -p "{PROMPT}"',
        (("bash", {"command": "cat a.txt"}),),
        {".vibe/config.toml": _VIBE_TOML},
    ),
    "aider": Agent(
        "Aider",
        _CHAT,
        f"OPENAI_API_BASE={API}/v1 OPENAI_API_KEY=none "
        f'aider --model openai/{MODEL} --yes-always --message "{PROMPT}" a.txt',
        (),
        plain="a.txt\n```\ntwo\n```\n",
    ),
    "mini-swe-agent": Agent(
        "mini-SWE-agent",
        _CHAT,
        f"OPENAI_API_BASE={API}/v1 OPENAI_API_KEY=none MSWEA_CONFIGURED=true MSWEA_COST_TRACKING=ignore_errors "
        f'mini -m openai/{MODEL} -y --exit-immediately -t "{PROMPT}"',
        (("bash", {"command": "cat a.txt"}), ("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"})),
    ),
}
"""Agents by name."""
