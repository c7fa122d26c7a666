#!/bin/sh
# Build .venv in the repository root from requirements.lock, or update it where that has changed. `make setup` runs
# this: about 3 minutes and 9 GB of disk the first time, nothing where .venv is up to date.
# Only .venv (and pip's own download cache) is written. PYTHON=... chooses the interpreter, 3.11 or newer.
set -eu
cd "$(dirname "$0")/.."
root=$(pwd)

inputs="requirements.lock setup.py tools/setup_venv.sh tools/install_detectron2.py tools/detectron2-b7ff946.manifest"
built_from="$(cat $inputs | cksum) $root" # a venv can't be moved
stamp=.venv/.stamp # written last
unfinished=.venv/.unfinished
by_hand=.venv/.by_hand # never to be removed

fail() {
    echo "error: $1" >&2
    exit 1
}
is_recent() { "$@" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
is_current() { [ "$(cat $stamp 2>/dev/null)" = "$built_from" ] && is_recent .venv/bin/python; }

remove_venv() {
    [ ! -e $by_hand ] || fail "the .venv that was made by hand is $1: move it away and run make setup again"
    echo "removing the .venv: it is $1"
    rm -rf .venv
}

if is_current; then exit 0; fi

# one at a time, where flock exists
if [ -z "${CROSSKD_SETUP_LOCKED:-}" ] && command -v flock >/dev/null; then
    flock -n tools/setup_venv.sh true || echo "waiting for another make that builds .venv"
    CROSSKD_SETUP_LOCKED=1 exec flock tools/setup_venv.sh sh tools/setup_venv.sh
fi
if is_current; then exit 0; fi

# An interrupted pip can leave half a package that looks whole: start anew. The same for a .venv of this script that
# was moved here or has lost its interpreter. A .venv made by hand is taken over.
if [ -e $unfinished ]; then
    remove_venv "unfinished, its set-up was interrupted"
elif [ -e $stamp ]; then
    case "$(cat $stamp)" in
    *" $root") is_recent .venv/bin/python || remove_venv "without its interpreter" ;;
    *) remove_venv "moved here from another folder" ;;
    esac
fi

if [ ! -e .venv ]; then
    without_venv=
    found=
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON" # its path may have spaces
    else
        set -- python3.11 python3 python3.12 python3.13 python
    fi
    for python in "$@"; do
        is_recent "$python" || continue
        if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            found=$python
            break
        fi
        without_venv=$python
    done
    if [ -z "$found" ] && [ -n "$without_venv" ]; then
        fail "$without_venv can't make virtual environments (on Debian and Ubuntu: apt-get install python3-venv)"
    elif [ -z "$found" ]; then
        fail "Python 3.11 or newer is needed and ${PYTHON:-python3} is none: make setup PYTHON=/path/to/python3.11"
    fi
    mkdir .venv
    touch $unfinished
    "$found" -m venv .venv || fail "$found -m venv failed"
elif ! is_recent .venv/bin/python; then
    fail "the .venv that is here has no Python 3.11 or newer: move it away or run make clean"
elif [ ! -e $stamp ]; then
    touch $by_hand
fi

touch $unfinished
rm -f $stamp
next="the next make setup builds it anew"
[ ! -e $by_hand ] || next="move it away before the next make setup"
trap 'echo "error: .venv is unfinished, the reason stands above; $next" >&2' EXIT
mkdir -p .venv/tmp .venv/cache
export TMPDIR="$root/.venv/tmp" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
install="pip install --no-build-isolation --use-pep517"
echo "installing requirements.lock into .venv"
# some packages come as source only, which needs setuptools to be there
sed -n '/^setuptools==/,/[^\\]$/p' requirements.lock >.venv/tmp/setuptools.lock
.venv/bin/python -m $install --quiet --require-hashes -r .venv/tmp/setuptools.lock
.venv/bin/python -m $install --require-hashes -r requirements.lock
.venv/bin/python tools/install_detectron2.py
.venv/bin/python -m $install --quiet --no-deps --editable .
rm -rf .venv/tmp
trap - EXIT
rm $unfinished
echo "$built_from" >$stamp
echo ".venv is ready"
