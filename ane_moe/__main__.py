"""`python -m ane_moe`."""

from ane_moe.cli import main

if __name__ == "__main__":  # worker processes import this module too
    main()
