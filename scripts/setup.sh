#!/bin/sh
# System packages, .venv, pinned dependencies. Done once: a second call compares four lines and leaves.
# Exit status 2 with the packages' names where they are missing and cannot be installed. FFCV=no does without FFCV, and so
# without compiler and system packages: sets are then kept in memory. PYTHON, PIP_ARGS and FFCV, once given, hold until others are:
# `make train` after `make setup FFCV=no` finds its .venv as it is (FFCV=yes takes that back, PIP_ARGS=" " the arguments).
set -eu
cd "$(dirname "$0")/.."

die() { printf 'error: %s\n' "$@" >&2; exit 2; }

chosen() { sed -n "s/^$1=//p" .venv/ready 2>/dev/null || :; }
python=${PYTHON:-$(chosen PYTHON)}
if [ -z "${PYTHON:-}" ] && ! command -v "$python" >/dev/null; then python=python3; fi    # nothing was chosen, or it has gone since
pip_args=${PIP_ARGS:-$(chosen PIP_ARGS)}
ffcv=${FFCV:-$(chosen FFCV)}
ffcv=${ffcv:-yes}

command -v "$python" >/dev/null || die "$python is not installed: install Python 3.11 or newer, or name one with PYTHON=..."
choices="PYTHON=$python
PIP_ARGS=$pip_args
FFCV=$ffcv"
state="$choices
made of $(cat pyproject.toml scripts/setup.sh | cksum) by $("$python" -c 'import sys; print(sys.version)')"
if [ -f .venv/ready ] && [ "$(cat .venv/ready)" = "$state" ]; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" -V) is too old: Python 3.11 or newer is needed; name one with PYTHON=..."

# FFCV is compiled: a C++ compiler, Python's headers, OpenCV, libturbojpeg, and pkg-config to find them.
missing() {
    command -v g++ >/dev/null || command -v c++ >/dev/null || echo compiler
    command -v pkg-config >/dev/null || { echo pkg-config; return; }
    pkg-config --exists opencv4 || echo OpenCV
    pkg-config --exists libturbojpeg || echo libturbojpeg
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        echo "Python headers"
    "$python" -c 'import ensurepip' 2>/dev/null || echo "Python venv"
}
if [ "$ffcv" != no ] && [ -n "$(missing)" ]; then
    apt="g++ pkg-config libopencv-dev libturbojpeg0-dev"
    # Only Debian's own interpreter takes its headers and venv from packages.
    case "$(command -v "$python")" in /usr/bin/*) apt="$apt python3-dev python3-venv" ;; esac
    root=
    if [ "$(id -u)" != 0 ]; then root="sudo -n"; fi
    if command -v apt-get >/dev/null && $root true 2>/dev/null; then
        echo "installing system packages: $apt"
        export DEBIAN_FRONTEND=noninteractive
        { $root apt-get update -qq && $root apt-get install -y -qq --no-install-recommends $apt; } >.setup.log 2>&1 ||
            { tail -5 .setup.log >&2; die "apt-get failed; its output is in .setup.log"; }
        rm -f .setup.log
    fi
    left=$(missing | tr '\n' ',' | sed 's/,$//; s/,/, /g')
    [ -z "$left" ] || die "FFCV cannot be compiled here; missing: $left. Install them and start again:" \
        "  apt    sudo apt-get install $apt" \
        "  dnf    sudo dnf install gcc-c++ pkgconf-pkg-config opencv-devel turbojpeg-devel python3-devel" \
        "  brew   brew install pkg-config opencv jpeg-turbo" \
        "  conda  conda install -c conda-forge cxx-compiler pkg-config libopencv libjpeg-turbo" \
        "or do without FFCV, which keeps sets in memory instead of streaming them: make setup FFCV=no"
fi

extras=test,ffcv
[ "$ffcv" != no ] || extras=test
echo "installing Python packages into .venv (a minute or two, more where torch's CUDA build is fetched)"
"$python" -m venv --clear .venv
printf '%s\n' "$choices" >.venv/ready    # not the whole of it: where pip fails, the next call starts again, with the same choices
.venv/bin/python -m pip install --quiet --disable-pip-version-check $pip_args --editable ".[$extras]"
printf '%s\n' "$state" >.venv/ready
