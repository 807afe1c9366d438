"""Settings.  In: TOML files, options, the environment, the machine.  Out: one frozen, fully resolved tree."""
