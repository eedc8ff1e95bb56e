# Debian packages of any suite, with the machine's own choice of suites left as it is. Sourced.

# debian_suite SUITE: makes `debian_apt` and `debian_apt_cache` look at this suite, and at no other.
debian_suite() {
    local state=$root/target/vm/apt/$1 mirror
    # The machine's own mirror, where it has one.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' |
        grep -E '/debian/?$' | head -n 1) || true
    mkdir -p "$state/lists/partial" "$state/archives/partial" "$state/sources"
    printf '%s\n' "Types: deb" "URIs: ${mirror:-http://deb.debian.org/debian}" "Suites: $1" "Components: main" \
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" >"$state/sources/suite.sources"
    debian_options=(
        -q
        -o Dir::Etc::SourceList=/dev/null
        -o "Dir::Etc::SourceParts=$state/sources"
        -o "Dir::State::Lists=$state/lists"
        -o "Dir::Cache=$state"
        -o APT::Sandbox::User=root
        -o APT::Install-Recommends=false
    )
    debian_apt update </dev/null
}
debian_apt() { apt-get "${debian_options[@]}" "$@"; }
debian_apt_cache() { apt-cache "${debian_options[@]}" "$@"; }
