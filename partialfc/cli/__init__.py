"""The command ``partialfc``: one module a verb."""
