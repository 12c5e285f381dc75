"""The `strobe` command: one thin file a verb."""
