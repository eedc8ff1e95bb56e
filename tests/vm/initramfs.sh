# Makes the guest's file system, an initramfs: busybox, a few tools of this machine, xfan's
# programs, guest/. Sourced.

# The modules that the guest needs; their dependencies are added. A name is skipped if the kernel
# has it built in or lacks it.
readonly modules=(
    virtio_pci virtio_net igb e1000e vmxnet3  # network interfaces
    veth bonding bridge 8021q tun dummy ipip  # interfaces that tests make
    xsk_diag af_packet_diag                   # ss --xdp
)
readonly tools=(ip ethtool ss ping install)
readonly programs=(xfan xfan-flow xfan-count xfan-replay xfan-verify)

# make_initramfs KERNEL FILE [TEST...]: with test executables, the guest also gets the checkout and
# its programs, at the same paths as on this machine.
make_initramfs() {
    local kernel=$root/target/vm/kernels/$1 file=$2 version folder program library applet
    shift 2
    version=$(cat "$kernel/version")
    folder=$(mktemp -d "$work/root-XXXXXX")
    chmod 755 "$folder"
    mkdir -p "$folder"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,run,tmp,root,etc,var/log,vm,captures}
    chmod 1777 "$folder/tmp"
    cp /bin/busybox "$folder/bin/"
    for applet in $(/bin/busybox --list); do
        [ "$applet" = busybox ] || ln -s /bin/busybox "$folder/bin/$applet"
    done
    ln -s /bin/busybox "$folder/sbin/modprobe" # the kernel calls it by this path
    for program in "${tools[@]}"; do
        # Replace busybox's link of this name.
        rm -f "$folder/bin/$program"
        add_program "$(command -v "$program")" "$folder/bin/$program"
    done
    for program in "${programs[@]}"; do
        add_program "$target/debug/$program" "$folder/bin/$program"
    done
    [ $# = 0 ] || add_tests "$folder" "$@"
    # Copy the shared libraries of all these to the same paths. busybox has none, for which ldd
    # fails.
    { find "$folder" -type f -perm /111 -exec ldd {} + 2>/dev/null || true; } | grep -o '/[^ :]*\.so[^ ]*' | sort -u |
        while read -r library; do
            mkdir -p "$folder$(dirname "$library")"
            cp -L "$library" "$folder$library"
        done
    printf '%s\n' root:x:0:0::/root:/bin/sh daemon:x:1:1::/:/bin/sh nobody:x:65534:65534::/:/bin/sh >"$folder/etc/passwd"
    printf '%s\n' root:x:0: daemon:x:1: nogroup:x:65534: >"$folder/etc/group"
    printf '%s\n' 'passwd: files' 'group: files' >"$folder/etc/nsswitch.conf"
    add_modules "$kernel/modules/lib/modules/$version" "$folder/lib/modules/$version"
    depmod -b "$folder" "$version"
    cp -r "$root/tests/vm/guest/." "$folder/vm/"
    cp "$captures"/*.pcap "$folder/captures/"
    ln -s vm/init "$folder/init"
    (cd "$folder" && find . | cpio --quiet -o -H newc) >"$file"
    rm -r "$folder"
}

# Adds the test executables, the checkout, and the programs at the paths where tests look for them.
add_tests() {
    local folder=$1 program
    shift
    mkdir -p "$folder$root" "$folder$target/debug"/{deps,examples}
    (cd "$root" && find . \( -path ./target -o -path ./.git \) -prune -o -type f -print | cpio --quiet -pdm "$folder$root")
    {
        find "$target/debug" -maxdepth 1 -name 'xfan*' -type f -perm /111
        find "$target/debug/examples" -maxdepth 1 -not -name '*-*' -type f -perm /111
        printf '%s\n' "$@"
    } | while read -r program; do
        add_program "$program" "$folder$program"
    done
    printf '%s\n' "$@" >"$folder/vm/tests"
    echo "$target/debug" >"$folder/vm/programs"
    echo "$root" >"$folder/vm/checkout"
    add_program /bin/bash "$folder/bin/bash" # scripts/quickstart
    add_program "$(command -v script)" "$folder/bin/script" # tests of the terminal
}

# add_program FROM TO: strips debug information, which would be most of the file.
add_program() {
    [ -x "$1" ] || fail "$1 is not there: \`cargo build --workspace\` makes it"
    install -m 755 "$1" "$2"
    strip --strip-debug "$2"
}

add_modules() {
    local from=$1 to=$2 module
    mkdir -p "$to"
    cp "$from"/modules.{builtin,builtin.modinfo,order} "$to"
    for module in "${modules[@]}"; do needed_modules "$from/modules.dep" "$module"; done | sort -u |
        (cd "$from" && xargs -r cp --parents -t "$to")
}

# Prints the files of a module and of all it depends on.
needed_modules() {
    awk -v module="$2" '
        { file = $1; sub(":$", "", file); name = file; sub(".*/", "", name); sub("\\.ko$", "", name); gsub("-", "_", name) }
        name == module { print file; for (n = 2; n <= NF; n++) print $n }' "$1"
}
