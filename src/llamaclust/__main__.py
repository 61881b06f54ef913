"""The entry of the command line, also for `python -m llamaclust`."""

import signal


def main() -> None:
    """Runs the command. Until its modules are imported, Ctrl-C ends the process without a traceback."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from llamaclust.cli.main import main as run

    signal.signal(signal.SIGINT, usual)
    run()


if __name__ == "__main__":
    main()
