#!/usr/bin/env bash
# Measure what backbones.md beside this file reports: bash experiments/throughput/backbones.sh [PART...]
# Parts: variants of configs/bench.py (about a minute each), selective_scan (a minute) and growth
# (ten minutes); all of them without arguments, half an hour on 2 CPU cores. Nothing else should run
# on them. What is there already is not measured again: remove its file from
# experiments/throughput/backbones to begin anew. Writes the tables of backbones.md at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=experiments/throughput/backbones
memjax="${MEMJAX:-.venv/bin/memjax}"
python="${PYTHON:-.venv/bin/python}"
mkdir -p "$out"

parts=(mamba2 mamba rg_lru mlstm ttt_linear titans_mac mom samba griffin gdn_h1 mamba2_attention
  linear_transformer based retnet gla deltanet hgrn2 ttt_mlp titans_lmm titans_mag titans_mal
  selective_scan growth)
if [ $# -gt 0 ]; then parts=("$@"); fi
for part in "${parts[@]}"; do
  if [ "$part" = growth ]; then  # goes on by itself where it was stopped
    $python experiments/throughput/growth.py --json="$out/growth.json"
    continue
  fi
  if [ -s "$out/$part.json" ]; then continue; fi
  echo "measure $part"
  if [ "$part" = selective_scan ]; then
    $python experiments/throughput/selective_scan.py --json="$out/new"
  else
    $memjax bench --config="configs/bench.py:$part" --seconds=8 --json | tail -n 1 > "$out/new"
  fi
  mv "$out/new" "$out/$part.json"
done
$python experiments/throughput/tables.py
