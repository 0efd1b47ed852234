#!/usr/bin/env bash
# Makes sure that the tools of the build and the tests are there; installs what is missing where it may, else prints the
# line that would. Never touches CUDA: the Makefile uses a toolkit that it finds and builds for the CPU where it finds none.
#   scripts/setup.sh            compiler, make, Python, BLAS, MPI, doctest
#   scripts/setup.sh --python   also the Python packages of scripts/requirements.txt, in .venv
set -euo pipefail
cd "$(dirname "$0")/.."

has() { command -v "$1" > /dev/null; }
header() { echo "#include <$1>" | g++ -E -x c++ - > /dev/null 2>&1; }

missing=()
has g++ || missing+=(g++)
has make || missing+=(make)
has python3 || missing+=(python3)
header cblas.h || missing+=(libopenblas-dev)
{ has mpicxx && has mpirun; } || missing+=(libopenmpi-dev openmpi-bin)
header doctest/doctest.h || missing+=(doctest-dev)
[[ ! -e /etc/debian_version || -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates) # for downloads
if [[ ${1:-} == --python ]]; then
    python3 -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
fi

if ((${#missing[@]})); then
    sudo=$( ((EUID == 0)) || echo "sudo ")
    give_up() {
        echo "setup: $1; install by hand, then run this again:" >&2
        echo "    ${sudo}apt-get update && ${sudo}apt-get install -y --no-install-recommends ${missing[*]}" >&2
        exit 1
    }
    has apt-get || give_up "${missing[*]} missing, and no apt-get here (the names below are Debian's)"
    admin=()
    if ((EUID != 0)); then
        admin=(sudo -n)
        "${admin[@]}" true 2> /dev/null || give_up "${missing[*]} missing, and only root may install them"
    fi
    echo "setup: installing ${missing[*]}"
    "${admin[@]}" apt-get -qq update || echo "setup: apt-get update failed; trying with the package lists at hand" >&2
    "${admin[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" \
        > /dev/null || give_up "apt-get could not install ${missing[*]}"
fi

if [[ ${1:-} == --python ]] && ! cmp -s scripts/requirements.txt .venv/requirements.txt; then
    echo "setup: Python packages into .venv (once)"
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --retries 2 --disable-pip-version-check -r scripts/requirements.txt ||
        { echo "setup: pip could not install scripts/requirements.txt (no network?)" >&2; exit 1; }
    cp scripts/requirements.txt .venv/requirements.txt # written last: marks .venv as complete
fi
