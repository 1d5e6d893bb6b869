"""The subcommands of `colqwen3`, one module each."""
