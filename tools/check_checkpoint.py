"""Verify checkpoints from the first to the last byte; ``--help`` lists the flags."""

from megatron_dwm.cli.check_checkpoint import main

if __name__ == "__main__":
    main()
