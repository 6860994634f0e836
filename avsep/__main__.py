"""``python -m avsep``."""

from avsep.cli import main

if __name__ == "__main__":
    main()
