"""`python -m llamaclust`: the command line."""

from llamaclust.cli.main import main

if __name__ == "__main__":
    main()
