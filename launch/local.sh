#!/usr/bin/env bash
# Train on this machine until the run is finished, whatever kills it on the way:
#   bash launch/local.sh --config=configs/quickstart.py [--workdir=RUN] [any argument of memjax train]
#   --processes=N   as N processes of one run (default 1)
#   --restarts=N    give up after N restarts in a row (default 10); an hour of training clears the count
#   --pause=S       wait S seconds before the first restart, twice as long before each next (default 2)
# Restarted: 75 (a process was told to stop), 76 (another process was lost) and death by a signal
# (out of memory, a fault). Not restarted: 0 (finished), 1 (it would fail again), 2 (a mistake).
# A SIGTERM or Ctrl-C to this script goes to the processes, which save, and ends it with their status.
set -uo pipefail
source "$(dirname "$0")/env.sh"

processes=1 restarts=10 pause=2 arguments=()
for argument in "$@"; do
  case "$argument" in
    --processes=*) processes="${argument#*=}" ;;
    --restarts=*) restarts="${argument#*=}" ;;
    --pause=*) pause="${argument#*=}" ;;
    *) arguments+=("$argument") ;;
  esac
done
for number in "$processes" "$restarts" "$pause"; do
  if ! [[ "$number" =~ ^[0-9]+$ ]]; then
    echo "launch: --processes, --restarts and --pause take whole numbers, not '$number'" >&2
    exit 2
  fi
done
if [ -z "${MEMJAX:-}" ]; then  # MEMJAX: the command to run instead
  make_venv "" || exit 1
  MEMJAX=.venv/bin/memjax
fi

pids=() told=""
forward() {  # the processes save and end; nothing is restarted
  told="$1"
  kill -s "$1" "${pids[@]}" 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward INT' INT

free_port() {
  "$(find_python)" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
  local index port="" several=()
  pids=()
  [ "$processes" -gt 1 ] && port="$(free_port)"
  for ((index = 0; index < processes; index++)); do
    [ "$processes" -gt 1 ] && several=(
      "--coordinator=127.0.0.1:$port" "--processes=$processes" "--process=$index")
    # A background job of a script would ignore Ctrl-C: `forward` sends it.
    $MEMJAX train ${arguments[@]+"${arguments[@]}"} ${several[@]+"${several[@]}"} &
    pids+=($!)
  done
}

# The status of the processes together: a mistake or a failure of one counts most, then a signal.
collect() {
  local pid code worst=0
  for pid in "${pids[@]}"; do
    while true; do
      wait "$pid"; code=$?
      kill -0 "$pid" 2>/dev/null || break  # else a signal to this script ended the wait
    done
    case "$code" in
      1 | 2) worst="$code" ;;
      0) ;;
      *) { [ "$worst" = 1 ] || [ "$worst" = 2 ]; } || worst="$code" ;;
    esac
  done
  return "$worst"
}

failed=0
while true; do
  begin="$SECONDS"
  start
  collect; status=$?
  [ -n "$told" ] && exit "$status"
  case "$status" in
    0 | 1 | 2) exit "$status" ;;
    75) why="a process was told to stop, and saved" ;;
    76 | 134) why="a process of the run was lost" ;;
    *) why="killed by signal $((status - 128))"
       [ "$status" -gt 128 ] || exit "$status" ;;
  esac
  [ $((SECONDS - begin)) -ge 3600 ] && failed=0
  failed=$((failed + 1))
  if [ "$failed" -gt "$restarts" ]; then
    echo "launch: status $status ($why) after $restarts restarts in a row; giving up" >&2
    exit "$status"
  fi
  wait_s=$((pause << (failed > 6 ? 6 : failed - 1)))
  echo "launch: status $status ($why); restart $failed of $restarts in $wait_s s" >&2
  sleep "$wait_s" &
  wait $!
  [ -n "$told" ] && exit "$status"
done
