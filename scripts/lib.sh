# Functions for the scripts: they find the checkout, Rust, and the user who builds. Sourced.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || fail "needs root for network namespaces and XDP: run it with sudo"
}

# The user who builds: the owner of the checkout if that user called sudo, otherwise the current
# user.
builder=$(id -un)
if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$(stat -c %U "$root")" = "$SUDO_USER" ]; then
    builder=$SUDO_USER
fi

# Finds the builder's Rust, although sudo resets PATH and HOME. Fails if it is missing or too old.
find_rust() {
    local home wanted found
    home=$(getent passwd "$builder" | cut -d: -f6)
    export CARGO_HOME=${CARGO_HOME:-$home/.cargo}
    if [ -z "${RUSTUP_HOME:-}" ] && [ -d "$home/.rustup" ]; then
        export RUSTUP_HOME=$home/.rustup
    fi
    PATH=$CARGO_HOME/bin:$PATH:/usr/local/cargo/bin
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    command -v cargo >/dev/null || fail "there is no Rust for user $builder. To install it, as that user:
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y"
    found=$(as_builder rustc --version | cut -d' ' -f2) || fail "rustc does not start for user $builder"
    at_least "$found" "$wanted" || fail "Rust is $found, but $wanted or newer is needed: run \`rustup update stable\`"
}

# Runs a command as the builder, in the checkout.
as_builder() {
    if [ "$builder" = "$(id -un)" ]; then
        (cd "$root" && "$@")
    else
        (cd "$root" && HOME=$(getent passwd "$builder" | cut -d: -f6) runuser -u "$builder" -- "$@")
    fi
}

# Whether version $1 is $2 or newer.
at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}
