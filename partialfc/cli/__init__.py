"""The command ``partialfc``: one module a verb, assembled by ``main``.

The top of the package: it may import every other room, and nothing imports it. Commands import what they need when they
run, so that ``--help`` needs neither torch nor pydantic.
"""
