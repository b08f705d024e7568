#!/usr/bin/env bash
# Install memjax with its development tools into .venv, then check style, types and all tests.
# Arguments go to pytest: bash launch/test.sh tests/test_config.py -k override
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_venv dev

.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 --dist=worksteal -m "not slow" "$@"
