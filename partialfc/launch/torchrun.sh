#!/usr/bin/env bash
# Train under torchrun, with exit codes that a supervisor can act on; --help prints arguments and settings:
#
#   launch/torchrun.sh CONFIG [key=value …] [--force]
#
# A Python module does the work: it reads the run's JSON state without starting a process each time, and catches signals
# without the race between a shell's trap and its wait. exec keeps the process id, so that signals to this script reach it.
exec "${PYTHON:-python3}" -m partialfc.launch.torchrun "$@"
