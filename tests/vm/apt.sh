# Downloads Debian packages of any suite. Does not change the machine's own suites and package
# lists. Sourced.

# debian_suites SUITE...: makes `debian_apt` and `debian_apt_cache` use these suites of Debian, and
# no others.
debian_suites() {
    local suites=$* mirror state
    state=$root/target/vm/apt/${suites// /+}
    # The mirror that the machine's own packages come from.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' |
        grep -E '/debian/?$' | head -n 1) || true
    [ -n "$mirror" ] || fail "apt has no Debian mirror configured on this machine: cannot download kernels"
    mkdir -p "$state/lists/partial" "$state/archives/partial" "$state/sources"
    printf '%s\n' "Types: deb" "URIs: $mirror" "Suites: $suites" "Components: main" \
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
