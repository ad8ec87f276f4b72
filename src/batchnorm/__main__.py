"""Run the command line by `python -m batchnorm`."""

from batchnorm.cli import main

if __name__ == "__main__":
    main()
