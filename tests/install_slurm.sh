#!/usr/bin/env bash
# Install what tests/launch/test_slurm.py needs, where that can be done: Debian or Ubuntu, as root. Elsewhere say so, and go on:
# the tests then skip with the reason.
set -uo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2)
command -v munged slurmctld slurmd sbatch ip >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "note: Slurm is not installed, and only root with apt can do that: ${packages[*]}"
    exit 0
fi
echo "installing ${packages[*]}"
# No service of these packages shall start by itself.
policy=/usr/sbin/policy-rc.d
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && trap 'rm -f $policy' EXIT; }
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } \
    >/dev/null 2>&1 || echo "note: apt-get could not install ${packages[*]}"
exit 0
