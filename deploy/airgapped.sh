#!/usr/bin/env bash
# Carries Python wheels to a host without network, in parts small enough for any way of carrying. See airgapped.md.
set -euo pipefail

PART_MIB=${PART_MIB:-60}
PYTHON=${PYTHON:-python3}

usage() {
  cat >&2 <<'TEXT'
airgapped.sh pack PARTS PIP_ARGUMENTS...      download wheels, pack them into PARTS/ (parts of PART_MIB, default 60)
airgapped.sh split WHEELS PARTS               pack wheels that are there already
airgapped.sh join PARTS WHEELS                check every part and unpack into WHEELS/
airgapped.sh install WHEELS VENV PIP_ARGUMENTS...   install from WHEELS/ alone into a new or existing VENV
TEXT
  exit 2
}

fail() { echo "airgapped: $*" >&2; exit 1; }

split_wheels() { # directory of wheels, directory for parts
  [ -n "$(ls -A "$1" 2>/dev/null)" ] || fail "$1 holds no wheels"
  mkdir -p "$2"
  [ -z "$(ls -A "$2")" ] || fail "$2 is not empty: parts of two archives must not mix"
  (cd "$1" && find . -type f -printf '%P\n' | LC_ALL=C sort) >"$2/CONTENTS"
  tar -C "$1" --files-from="$2/CONTENTS" -cf - | split -b "${PART_MIB}M" -d -a 4 - "$2/wheels.tar.part-"
  (cd "$2" && sha256sum CONTENTS wheels.tar.part-*) >"$2/SHA256SUMS.partial"
  mv "$2/SHA256SUMS.partial" "$2/SHA256SUMS"
  echo "$(wc -l <"$2/CONTENTS") files in $(ls "$2" | grep -c part-) parts of at most ${PART_MIB} MiB: $2"
}

join_parts() { # directory of parts, directory for wheels
  [ -f "$1/SHA256SUMS" ] || fail "$1/SHA256SUMS is missing: carry it along with the parts"
  (cd "$1" && sha256sum --quiet --check SHA256SUMS) || fail "carry the parts named above again"
  local listed; listed=$(awk '{print $2}' "$1/SHA256SUMS" | grep part-)
  mkdir -p "$2"
  (cd "$1" && cat $listed) | tar -C "$2" -xf -
  while read -r name; do [ -f "$2/$name" ] || fail "$name did not come out of the archive"; done <"$1/CONTENTS"
  echo "$(wc -l <"$1/CONTENTS") files in $2"
}

[ $# -ge 3 ] || usage
command=$1; shift
case $command in
  pack)
    parts=$1; shift
    scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT
    "$PYTHON" -m pip download --disable-pip-version-check --quiet --dest "$scratch/wheels" "$@"
    split_wheels "$scratch/wheels" "$parts" ;;
  split) split_wheels "$1" "$2" ;;
  join) join_parts "$1" "$2" ;;
  install)
    wheels=$1; venv=$2; shift 2
    [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-index --find-links "$wheels" "$@" ;;
  *) usage ;;
esac
