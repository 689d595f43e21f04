# Sourced by scripts/quickstart, scripts/test and .ci/run: finds a Python, makes .venv, installs what is missing.
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repository/.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 DEBIAN_FRONTEND=noninteractive

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_updated=
# apt_install PACKAGE...: install Debian packages; says what and why it failed.
apt_install() {
    local log
    log=$(mktemp)
    if [ -z "$apt_updated" ]; then
        apt-get update -qq >"$log" 2>&1 </dev/null || say "apt-get update failed: $(tail -n 1 "$log")"
        apt_updated=1
    fi
    if ! apt-get install -qq -y --no-install-recommends "$@" >"$log" 2>&1 </dev/null; then
        say "apt-get install $* failed: $(tail -n 1 "$log")"
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# need COMMAND PACKAGE REASON: have a command; as root on Debian install its package, else say what will be skipped.
need() {
    local PATH=$PATH:/usr/sbin:/sbin
    command -v "$1" >/dev/null && return 0
    if can_apt; then
        say "installing $2: $3"
        apt_install "$2" && return 0
    fi
    say "no '$1' here (Debian package $2): $3 will be skipped"
}

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (4,))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if suitable "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    return 1
}

# make_venv: have a working .venv of a suitable Python.
make_venv() {
    local python
    if [ -x "$venv/bin/python" ] && suitable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    if ! python=$(find_python); then
        can_apt || die "Python 3.11 or newer is needed; install it, or name it with PYTHON=/path/to/python3"
        say "installing python3: Python 3.11 or newer is needed"
        apt_install python3 python3-venv || die "python3 could not be installed"
        python=$(find_python) || die "this system's python3 is older than 3.11; name a newer one with PYTHON=/path/to/python3"
    fi
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        can_apt || die "$python lacks the venv module; on Debian or Ubuntu run: sudo apt install python3-venv"
        say "installing python3-venv: $python lacks the venv module"
        apt_install "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" ||
            apt_install python3-venv || die "python3-venv could not be installed"
    fi
    say "making .venv with $("$python" --version) ($python)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || die "the virtual environment $venv could not be made"
}

compiles() {
    local include
    include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    printf '#include <Python.h>\n#include <gmp.h>\n' | cc -I"$include" -E - >/dev/null 2>&1
}

# need_compiler: libp2p needs fastecdsa 2.3.2, which PyPI has as source only for most Pythons, and that needs GMP.
need_compiler() {
    local version
    compiles && return 0
    can_apt || return 1
    version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    say "installing gcc, libgmp-dev and python$version-dev: a dependency is compiled here"
    # A Python from elsewhere brings its own headers, and Debian may have no package of its version.
    apt_install gcc libc6-dev libgmp-dev "python$version-dev" || apt_install gcc libc6-dev libgmp-dev
    compiles
}

# install_project [EXTRA]: the project with its dependencies in .venv, unless they are there already.
install_project() {
    local extra=${1:-} stamp log target compiler=1
    stamp=$venv/.installed${extra:+-$extra}
    if cmp -s "$repository/pyproject.toml" "$stamp"; then
        return 0
    fi
    if [ -z "$extra" ] && cmp -s "$repository/pyproject.toml" "$venv/.installed-dev"; then
        return 0
    fi
    need_compiler || compiler=
    target=$repository${extra:+[$extra]}
    say "installing p2pnode${extra:+ with its $extra extras} and its dependencies from PyPI"
    log=$venv/install.log
    if ! "$venv/bin/python" -m pip install --progress-bar off -e "$target" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        [ -n "$compiler" ] || say "a C compiler with the headers of Python and GMP is missing, which may be the reason;" \
            "on Debian or Ubuntu run: sudo apt install gcc python3-dev libgmp-dev"
        die "pip install failed (whole output in $log); is PyPI reachable from here?"
    fi
    cp "$repository/pyproject.toml" "$stamp"
}
