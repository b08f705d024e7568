# Sourced by the scripts beside it: makes .venv with memjax in it, from the extras named in $1.
# Uses $PYTHON if set, else the newest Python from 3.11 on that runs here.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "launch: no Python 3.11 or newer found; install one, or set PYTHON=/path/to/python" >&2
  return 1
}

make_venv() {
  local extras="$1" python stamp
  stamp=".venv/installed-${extras:-plain}"
  if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ]; then
    return 0
  fi
  if [ ! -x .venv/bin/python ]; then
    python="$(find_python)" || return 1
    echo "launch: making .venv with $("$python" --version)"
    "$python" -m venv .venv || return 1
  fi
  echo "launch: installing memjax${extras:+[$extras]} (a minute or two the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" \
    || { echo "launch: pip could not install memjax; its message is above" >&2; return 1; }
  touch "$stamp"
}
