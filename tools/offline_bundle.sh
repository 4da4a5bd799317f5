#!/usr/bin/env bash
# Collect the wheels that a machine without a network needs to install EVEREST-DS:
#
#   tools/offline_bundle.sh FOLDER [--python 3.12]     default: the version of the Python that runs this
#
# Run this script on a machine that reaches PyPI and has .venv from `make` (or set PYTHON to a Python with torch
# and setuptools). The wheels are for Linux on x86-64, in the versions of constraints.txt. PyTorch is left out: the
# target machine has its own, built for its driver. DeepSpeed and fairscale are built without compiled operators,
# which training does not use (only offload_to_nvme needs one, and compiles it on the target machine).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit "$1"; }
[ $# -ge 1 ] || usage 2
case $1 in -h | --help) usage 0 ;; -*) usage 2 ;; esac
folder=$1
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "error: no Python at $python; fix: run make, or set PYTHON" >&2; exit 2; }
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case ${2:-} in "") ;; --python) version=${3:?"error: --python needs a version such as 3.12"} ;; *) usage 2 ;; esac

pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
pinned() { grep -E "^$1==" constraints.txt; }

mkdir -p "$folder"
rm -f "$folder"/*.whl # otherwise pip could find wheels of an earlier version beside the new ones
DS_BUILD_OPS=0 pip wheel --no-deps --no-build-isolation --wheel-dir "$folder" \
    . "$(pinned deepspeed)" "$(pinned fairscale)"
"$python" tools/offline_requirements.py "$version" constraints.txt "$folder"/*.whl > "$folder/requirements.txt"
platforms=()
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
for name in manylinux2014 manylinux2010 manylinux1; do platforms+=(--platform "${name}_x86_64"); done
pip download --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" \
    --dest "$folder" --requirement "$folder/requirements.txt"

du --bytes "$folder"/*.whl | sort -rn | awk '{ n = split($2, path, "/"); printf "%8.1f MB  %s\n", $1 / 1e6, path[n]; all += $1 }
    END { printf "%8.1f MB  in %d wheels\n", all / 1e6, NR }'
cat <<END

Copy $folder to the target machine. There, in a Python $version environment with PyTorch, run:

  python -m pip install --no-index --find-links $(basename "$folder") everest-ds
END
