"""`python -m esolm` is `esolm`."""

from esolm.cli import main

if __name__ == "__main__":
    main()
