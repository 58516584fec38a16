"""`python -m miras` is `miras`."""

from miras.cli import main

if __name__ == "__main__":
    main()
