"""Starts a cluster of two workers, sends a prompt, shows the status and stops the cluster.

Prints every command that it runs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.config.environment import environment

LLAMACLUST = str(Path(sys.executable).parent / "llamaclust")
NAME = f"demo-{os.getpid()}"
SYSTEM = "You answer questions correctly and briefly, in English."
QUESTION = "What is the capital of France?"
DEADLINE_S = 600


def run(*arguments: str, question: str | None = None) -> str:
    """Runs a llamaclust command. Prints the command and its output, and returns the output."""
    typed = shlex.join(("llamaclust", *arguments))
    print(f"\n$ {f'echo {shlex.quote(question)} | ' if question else ''}{typed}", flush=True)
    done = subprocess.run(
        [LLAMACLUST, *arguments], input=question, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout


def main() -> None:
    run("model", "pull", "smollm2-135m-instruct")
    run("up", "--detach", "--port", "0", "--set", f"name={NAME}")
    try:
        answer = run("chat", "--cluster", NAME, "--temperature", "0", "--system", SYSTEM, question=QUESTION)
        status = run("status", "--cluster", NAME)
    finally:
        run("down", "--cluster", NAME)
    if "Paris" not in answer:
        raise SystemExit("the answer is wrong: please report this with the output above")
    # The logs of a failed demo are kept. The measurements of the machine are kept in any case.
    shutil.rmtree(environment().state_dir / NAME, ignore_errors=True)
    # On a busy machine, a plan with one worker may be faster than one with both.
    used = "both workers" if len(re.findall(r"\[\d+, \d+\)", status)) == 2 else "one worker"
    print(f"\nThe answer came through {used}. Start your own cluster with `.venv/bin/llamaclust up`.")


if __name__ == "__main__":
    with ends_in_one_line():
        main()
