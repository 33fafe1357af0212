#!/usr/bin/env bash
# Install the packages for tests/launch/test_slurm.py: on Debian or Ubuntu, as root. Elsewhere report what is missing; the
# tests then skip with the reason.
set -uo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2)
missing() {
    for program in munged slurmctld slurmd sbatch unshare ip; do
        command -v "$program" >/dev/null || echo "$program"
    done
}
[ -n "$(missing)" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "note: no tests on Slurm; only root with apt-get can install ${packages[*]}; missing: $(missing | paste -sd " ")" >&2
    exit 0
fi
echo "installing ${packages[*]}"
# No service of these packages may start by itself.
policy=/usr/sbin/policy-rc.d
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && trap 'rm -f $policy' EXIT; }
log=$(mktemp)
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } \
    >"$log" 2>&1
if [ -n "$(missing)" ]; then
    tail -n 5 "$log" >&2
    echo "error: apt-get did not install ${packages[*]}; missing: $(missing | paste -sd " ")" >&2
    exit 1
fi
