//! The compiled program: its bytes, and the skeleton that libbpf-cargo generates from them.

/// Aligned as ELF headers must be for a loader that reads them in place.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/xfan.bpf.o")));

/// The eBPF object, for a loader other than this crate. Its one program is `xfan_steer`;
/// [`rule_table`](crate::rule_table) and [`QueueCounters::from_words`](crate::QueueCounters::from_words) give
/// meaning to its maps.
pub static OBJECT: &[u8] = &ALIGNED.0;

#[allow(missing_docs, unused, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
#[rustfmt::skip]
pub(crate) mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/xfan.skel.rs"));
}
