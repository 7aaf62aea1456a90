#!/bin/sh
# System packages, .venv, pinned dependencies. Done once: a second call compares one line and leaves.
# Exit status 2 with the packages' names where they are missing and cannot be installed. FFCV=no does without FFCV, and so
# without compiler and system packages: sets are then kept in memory.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

die() { printf 'error: %s\n' "$@" >&2; exit 2; }

command -v "$python" >/dev/null || die "$python is not installed: install Python 3.11 or newer, or name one with PYTHON=..."
state="$("$python" -c 'import sys; print(sys.version)') $(cat pyproject.toml scripts/setup.sh | cksum) ${PIP_ARGS:-} ${FFCV:-}"
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
if [ "${FFCV:-yes}" != no ] && [ -n "$(missing)" ]; then
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
[ "${FFCV:-yes}" != no ] || extras=test
echo "installing Python packages into .venv (a minute or two, more where torch's CUDA build is fetched)"
"$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} --editable ".[$extras]"
printf '%s\n' "$state" >.venv/ready
