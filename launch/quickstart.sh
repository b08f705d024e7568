#!/usr/bin/env bash
# Install memjax into .venv, train a small recurrent-memory model on the source code of Python's
# standard library, evaluate it and sample from it. Run it again to go on where it was stopped.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_venv ""

run="${1:-runs/quickstart}"
memjax=.venv/bin/memjax
"$memjax" train --config=configs/quickstart.py --workdir="$run"
"$memjax" eval --workdir="$run"
"$memjax" generate --workdir="$run" --prompt="def " --tokens=200 --temperature=0.7

cat <<TEXT

Everything is in $run: config.json, metrics.jsonl, checkpoints/, tensorboard/, eval/.
Try next:
  source .venv/bin/activate
  memjax eval --workdir=$run --carry=false          # what is the carried memory worth?
  memjax train --config=configs/quickstart.py:attention --workdir=runs/attention
  memjax train --help
TEXT
