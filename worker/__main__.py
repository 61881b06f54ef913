"""Worker process, started by launchers as `python -m llamaclust.worker --name NAME` with settings on standard input."""

from __future__ import annotations

import logging
import sys

from llamaclust.core.errors import UsageError
from llamaclust.core.process_settings import collect_rarely
from llamaclust.wire.rpc.grpc_options import tune_grpc
from llamaclust.worker.settings import WorkerSettings


def main() -> None:
    collect_rarely()
    settings = WorkerSettings.from_json(sys.stdin.buffer.read())
    assert sys.argv[1:] == ["--name", settings.name], "the name is an argument so that `ps` shows it"
    tune_grpc()
    from llamaclust.worker.main import end_process, run_worker

    try:
        code = run_worker(settings)
    except UsageError as error:
        logging.getLogger("llamaclust.worker").error("%s", error)
        code = error.exit_code
    end_process(code)


if __name__ == "__main__":
    main()
