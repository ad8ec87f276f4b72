"""Lets `python -m batchnorm` do what the command `batchnorm` does."""

from batchnorm.cli import main

if __name__ == "__main__":
    main()
