#!/usr/bin/env bash
# Makes sure that the tools of the build and the tests are there; installs what is missing where it may, else prints the
# line that would. What is missing say the Makefile's own probes (make found), which compile, link and run: a header that
# lies about is not a library. Never touches CUDA: the Makefile uses a toolkit that it finds and builds for the CPU where it
# finds none.
#   scripts/setup.sh            compiler, make, Python, BLAS, MPI, doctest
#   scripts/setup.sh --python   also the Python packages of scripts/requirements.txt, in .venv
#   scripts/setup.sh --lint     also what make lint needs: clang-format 14, clang-tidy 14, shellcheck
set -euo pipefail
cd "$(dirname "$0")/.."

python="" lint=""
for argument in "$@"; do
    case $argument in
        --python) python=yes ;;
        --lint) lint=yes ;;
        *) echo "setup: '$argument' is neither --python nor --lint" >&2; exit 2 ;;
    esac
done

has() { command -v "$1" > /dev/null; }
compiles() { echo 'int main() {}' | ${CXX:-g++} -x c++ - -o /dev/null 2> /dev/null; }

# apt-get says little when it is quiet and pages when it is not: what is to come, then a line every few seconds.
progress() {
    local line next=$((SECONDS + 4))
    while IFS= read -r line; do
        case $line in
            "Need to get"*) echo "setup: ${line,}" ;;
            Get:* | Unpacking* | "Setting up"*)
                ((SECONDS >= next)) || continue
                echo "setup: ${line:0:90}"
                next=$((SECONDS + 4))
                ;;
        esac
    done
}

updated=""
install() { # Debian packages...
    local sudo=() listed=$*
    ((EUID == 0)) || sudo=(sudo -n)
    give_up() {
        echo "setup: $1; install by hand, then run this again:" >&2
        echo "    ${sudo:+sudo }apt-get update && ${sudo:+sudo }apt-get install -y --no-install-recommends $listed" >&2
        exit 1
    }
    has apt-get || give_up "$listed missing, and no apt-get here (the names below are Debian's)"
    "${sudo[@]}" true 2> /dev/null || give_up "$listed missing, and only root may install them"
    echo "setup: installing $listed"
    if [[ ! $updated ]]; then
        echo "setup: reading Debian's lists of packages"
        "${sudo[@]}" apt-get -qq update || echo "setup: apt-get update failed; trying with the package lists at hand" >&2
        updated=yes
    fi
    "${sudo[@]}" env LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@" | progress ||
        give_up "apt-get could not install $listed"
}

# Each word of `make found` that we want, and the packages that bring it.
libraries='blas libopenblas-dev
mpi libopenmpi-dev openmpi-bin
mpirun libopenmpi-dev openmpi-bin
doctest doctest-dev'
not_found() { # the lines of which make does not find the word
    local found line
    found=" $(make -s found) "
    while IFS= read -r line; do [[ $found == *" ${line%% *} "* ]] || echo "$line"; done <<< "$libraries"
}
packages() { cut -d' ' -f2- | tr ' ' '\n' | sort -u; }

# First what the probes themselves stand on (without it none can find anything), then what they do not find.
missing=()
compiles || missing+=(g++)
has make || missing+=(make)
((${#missing[@]} == 0)) || mapfile -t -O ${#missing[@]} missing < <(packages <<< "$libraries")
has python3 || missing+=(python3)
[[ ! -e /etc/debian_version || -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates) # for downloads
((${#missing[@]} == 0)) || install "${missing[@]}"

mapfile -t missing < <(not_found | packages)
if [[ $python ]]; then
    python3 -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
fi
if [[ $lint ]]; then # clang-format's versions differ in what they call formatted
    for tool in clang-format clang-tidy; do
        has "$tool-14" || [[ $("$tool" --version 2> /dev/null) == *"version 14."* ]] || missing+=("$tool-14")
    done
    has shellcheck || missing+=(shellcheck)
fi
if ((${#missing[@]})); then
    install "${missing[@]}"
    still=$(not_found | cut -d' ' -f1 | tr '\n' ' ')
    [[ ! $still ]] || echo "setup: installed, but make still finds no: $still(make goes on without)" >&2
fi

if [[ $python ]] && ! cmp -s scripts/requirements.txt .venv/requirements.txt; then
    echo "setup: Python packages into .venv (once)"
    python3 -m venv .venv
    .venv/bin/python -m pip install --progress-bar off --retries 2 --disable-pip-version-check -r scripts/requirements.txt |
        sed -unE 's/^ *(Downloading [^ ]+whl.*|Installing .*)/setup: \1/p' ||
        { echo "setup: pip could not install scripts/requirements.txt (no network?)" >&2; exit 1; }
    cp scripts/requirements.txt .venv/requirements.txt # written last: marks .venv as complete
fi
