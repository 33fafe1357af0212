"""The command ``partialfc``: one module per verb, assembled by ``main``.

May import every other room; only ``__main__`` imports it. Commands import their dependencies when they run, so that
``--help`` needs neither torch nor pydantic.
"""
