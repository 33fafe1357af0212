#!/usr/bin/env bash
# Train under torchrun, on one host or on many, with exit codes that a supervisor can act on:
#
#   launch/torchrun.sh CONFIG [key=value …] [--force]
#
#   0 finished · 1 failed · 2 wrong usage or config · 75 stopped on request with a checkpoint written: start me again
#
# TERM, USR1 and INT to this script ask the run to stop. (Not torchrun: USR1 kills it and leaves its workers behind, and
# 30 seconds after TERM it kills them, with or without a checkpoint.)
#
# One host:    NPROC=8 launch/torchrun.sh configs/….yaml
# Many hosts:  the same command on each, with NNODES=4 RDZV_ENDPOINT=first-host:29400
# Elastic:     NNODES=3:4 starts with three or four, and goes on when one is lost or joins
set -uo pipefail

PYTHON=${PYTHON:-python3}        # the Python that partialfc is installed in
NPROC=${NPROC:-auto}             # ranks a host: a number, or auto: one a GPU, without GPUs one a core
NNODES=${NNODES:-1}              # hosts: a number, or MIN:MAX
RDZV_ENDPOINT=${RDZV_ENDPOINT:-} # host:port of one of them, which all can reach
RDZV_ID=${RDZV_ID:-partialfc}    # the same on all hosts, another for each run
RDZV_CONF=${RDZV_CONF:-}         # key=value,… for the rendezvous, e.g. last_call_timeout=10
LOCAL_ADDR=${LOCAL_ADDR:-}       # where the others reach this host; default: its name
MAX_RESTARTS=${MAX_RESTARTS:-3}  # of all ranks, after one has failed
LOG_DIR=${LOG_DIR:-}             # stdout and stderr of each attempt and rank; default: logs in the run folder
STOPPED=${STOPPED:-75}           # the code that says: stopped on request

# The run's own settings; whatever is set already stays.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export PYTHONUNBUFFERED=1

if [ $# -lt 1 ]; then
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

run='' asked='' words='' code_file='' own='' made='' attempt_before=''
state() { # KEY: how this start is doing by its own file, else by state.json; or nothing
    "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' \
        "${own:-$run/state.json}" "$1" 2>/dev/null
}
begun() { [ "$(state attempt)" != "$attempt_before" ]; }
leave_request() { # to our own attempt: it may still wait for that of another start, which must not take it
    if [ -n "$own" ] && ! begun; then return 1; fi
    words="$asked to launch/torchrun.sh on $(hostname)${SLURM_JOB_ID:+, job $SLURM_JOB_ID}"
    echo "$words" >"$run/.stop.$$" && mv "$run/.stop.$$" "$run/stop" # in one move: the run must not read half of it
}
# shellcheck disable=SC2317,SC2329 # called by a trap
ask_to_stop() {
    asked=$1 interrupted=yes
    echo "launch/torchrun.sh: got $asked; asking the run to stop"
    [ -z "$code_file" ] || leave_request
}
for signal in TERM USR1 INT; do
    # shellcheck disable=SC2064  # the name is meant to be filled in now
    trap "ask_to_stop $signal" "$signal"
done
# shellcheck disable=SC2317,SC2329 # called by a trap
clean_up() { # a request that came too late must not stop the next start
    rm -f "$code_file" "$made"
    [ -z "$words" ] || [ "$(cat "$run/stop" 2>/dev/null)" != "$words" ] || rm -f "$run/stop"
}
trap clean_up EXIT

# Ask before ranks are started: a mistake in the config is said once, and not by every rank of every restart.
settings=()
for word in "$@"; do [ "$word" = --force ] || settings+=("$word"); done
run=$("$PYTHON" -m partialfc config "${settings[@]}" --get run.dir) || exit $?

logs=${LOG_DIR:-$run/logs}
mkdir -p "$logs" "$run" || exit 2

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    ranks=$NPROC
    [[ $ranks =~ ^[0-9]+$ ]] || ranks=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || ranks=$(nproc)
    threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# Where the first rank says how this start is doing: what state.json says may be of another.
own=${PARTIALFC_STATE_FILE:-}
if [ -z "$own" ] && [ "$NNODES" = 1 ] && [ -z "$RDZV_ENDPOINT" ]; then
    own=$(mktemp) made=$own
    export PARTIALFC_STATE_FILE=$own
fi
attempt_before=$(state attempt)
code_file=$(mktemp)
export PARTIALFC_CODE_FILE=$code_file

where=(--standalone)
if [ "$NNODES" != 1 ] || [ -n "$RDZV_ENDPOINT" ]; then
    [ -n "$RDZV_ENDPOINT" ] || { echo "error: NNODES=$NNODES needs RDZV_ENDPOINT=host:port" >&2; exit 2; }
    where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID")
    # As long as the others wait for a host (join_timeout) it waits for them: a cut of a minute would end it for good.
    where+=(--rdzv-conf "read_timeout=600${RDZV_CONF:+,$RDZV_CONF}")
    [ -z "$LOCAL_ADDR" ] || where+=(--local-addr "$LOCAL_ADDR")
    # Else torchrun tells the address of the ranks' store in its first round only, and a host that comes later waits for
    # it in vain, until all give up. So the first rank keeps the store, and each round has one of its own.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
fi

# In a session of its own: what a terminal or Slurm sends to this group must not reach torchrun.
setsid "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    --log-dir "$logs" --tee 3 -m partialfc train "$@" &
torchrun=$!

interrupted=yes
while [ -n "$interrupted" ]; do # a signal ends the waiting, and not the run
    interrupted=''
    while [ -n "$asked" ] && [ -z "$words" ] && kill -0 "$torchrun" 2>/dev/null; do
        leave_request || sleep 0.2 # it came while nobody was there to take it
    done
    wait "$torchrun"
    code=$?
done

ended=''
if begun; then
    ended=$(state state)
elif [ "$code" -eq 0 ]; then # nothing was left to do
    own=''
    ended=$(state state)
fi
case $ended in
    finished) exit 0 ;;
    preempted) exit "$STOPPED" ;;
esac
failed='' why=''
{ read -r failed && read -r why; } <"$code_file"
[ -z "$why" ] || echo "error: $why" >&2 # once more: torchrun's own words stand between
[ "$failed" = 2 ] && exit 2
exit 1
