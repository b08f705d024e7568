#!/usr/bin/env bash
# Install memjax into .venv, with what a sweep on Slurm needs, and run a sweep; all arguments go to
# `memjax sweep`: bash launch/sweep.sh --sweep=FILE --executor=slurm --slurm.partition=gpu
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_venv slurm

exec .venv/bin/memjax sweep "$@"
