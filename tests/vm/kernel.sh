# Kernels for the guest: Debian's packages, unpacked to target/vm/kernels/NAME and installed
# nowhere. Sourced.
#
# Each folder holds vmlinuz, version, and modules/ with the modules that a network interface may
# need. To get the newest package again, remove the folder.
source "$root/tests/vm/apt.sh"

readonly kernels=(5.10 6.1 6.12 recent)

# Prints the suite whose linux-image-amd64 is this kernel.
kernel_suite() {
    case $1 in
        5.10) echo bullseye ;;
        6.1) echo bookworm ;;
        6.12) echo bookworm-backports ;;
        recent) echo trixie-backports ;;
        *) return 1 ;;
    esac
}

# fetch_kernel NAME: downloads and unpacks the kernel, unless its folder exists.
fetch_kernel() {
    local name=$1 folder=$root/target/vm/kernels/$1 suite packages
    [ ! -s "$folder/version" ] || return 0
    suite=$(kernel_suite "$name")
    step "kernel $name: linux-image-amd64 of $suite"
    rm -rf "$folder" && mkdir -p "$folder/deb"
    debian_suites "$suite" || fail "cannot get kernel $name: the package mirror does not have $suite"
    # From Linux 7 on, Debian splits the kernel image into several packages.
    packages=$(debian_apt_cache depends --recurse --important linux-image-amd64 |
        grep -E '^linux-(image|base|binary|modules)-[0-9]' | grep -v -- '-unsigned$' | sort -u)
    [ -n "$packages" ] || fail "cannot get kernel $name: $suite has no linux-image-amd64"
    # shellcheck disable=SC2086 # one word for each package
    (cd "$folder/deb" && debian_apt download $packages </dev/null) ||
        fail "cannot get kernel $name: cannot download $packages"
    unpack_kernel "$folder"
    say "kernel $name: $(cat "$folder/version")"
}

# Writes `version` last: a folder that has it is complete.
unpack_kernel() {
    local folder=$1 name deb unpacked version kind kept
    name=$(basename "$folder")
    for deb in "$folder"/deb/*.deb; do dpkg -x "$deb" "$folder/deb/all"; done
    unpacked=$(find "$folder/deb/all" -path '*/lib/modules/*' -prune -print -quit)
    [ -n "$unpacked" ] || fail "cannot get kernel $name: there are no modules in $(ls "$folder/deb")"
    version=$(basename "$unpacked")
    cp "$folder/deb/all/boot/vmlinuz-$version" "$folder/vmlinuz" 2>/dev/null || cp "$unpacked/vmlinuz" "$folder/vmlinuz"
    kept=$folder/modules/lib/modules/$version
    mkdir -p "$kept/kernel"
    for kind in arch/x86/crypto crypto drivers/{dca,i2c,net,pps,ptp,virtio} lib net; do
        [ ! -d "$unpacked/kernel/$kind" ] || (cd "$unpacked" && cp -a --parents "kernel/$kind" "$kept")
    done
    cp "$unpacked"/modules.{builtin,builtin.modinfo,order} "$kept"
    find "$kept" -name '*.ko.xz' -print0 | xargs -0 -r -n 64 xz -d
    find "$kept" -name '*.ko.zst' -print0 | xargs -0 -r -n 64 zstd -q -d --rm
    depmod -b "$folder/modules" "$version"
    rm -r "$folder/deb"
    echo "$version" >"$folder/version"
}
