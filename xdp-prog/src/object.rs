//! The compiled program: its bytes, and the skeleton that libbpf-cargo generates from them.

/// Aligns the object, so that a loader may read ELF headers in place.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/xfan.bpf.o")));

/// The eBPF object, for loaders other than this crate. Its only program is `xfan_steer`. Write its
/// rules with [`rule_table`](crate::rule_table), and read its counters with
/// [`QueueCounters::from_words`](crate::QueueCounters::from_words).
pub static OBJECT: &[u8] = &ALIGNED.0;

#[allow(missing_docs, unused, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
#[rustfmt::skip]
pub(crate) mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/xfan.skel.rs"));
}
