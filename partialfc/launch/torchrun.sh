#!/usr/bin/env bash
# Train under torchrun, with exit codes that a supervisor can act on; --help prints arguments and settings:
#
#   launch/torchrun.sh CONFIG [key=value …] [--force]
#
# The work is done by a Python module: it reads the run's JSON state at every look, which a shell would have to start a
# Python for, and it catches signals without the race between a shell's trap and its wait. exec keeps the process id,
# so that signals sent to this script reach it.
exec "${PYTHON:-python3}" -m partialfc.launch.torchrun "$@"
