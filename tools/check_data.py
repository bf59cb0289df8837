"""Verify datasets from the first to the last byte; ``--help`` lists the flags."""

from megatron_dwm.cli.check_data import main

if __name__ == "__main__":
    main()
