//! Modes: the XDP mode, bind mode and frame size to use, and the order in which to try them.
//!
//! | what | how | falls back to |
//! |---|---|---|
//! | XDP mode | native: the driver runs the program; generic: the kernel's stack does | generic |
//! | bind mode | zero-copy: the NIC writes into frames; copy: the kernel does | copy |
//!
//! This module does not ask the kernel. [`crate::start`] learns whether a mode works when it binds
//! the sockets and attaches the program, and tries the next mode if it does not.

use std::fmt;

use crate::config::{BindMode, Config, ModeChoice};
use crate::host::interface::Interface;

/// Bytes that the kernel reserves in a frame before the packet (`XDP_PACKET_HEADROOM`).
const HEADROOM: u32 = 256;
/// An Ethernet header and two VLAN tags, which the MTU does not include.
const LINK_HEADER: u32 = 14 + 2 * 4;
/// The frame check sequence, which a NIC in zero-copy mode may write after the packet.
const FCS: u32 = 4;

/// The sizes a frame can have, in bytes.
const FRAME_SIZES: [u32; 2] = [2048, 4096];

/// Drivers without zero-copy, for which `auto` does not try it. For others the try takes a few
/// milliseconds.
const WITHOUT_ZERO_COPY: [&str; 3] = ["veth", "tun", "bonding"];

/// Drivers that tell the NIC the true buffer length of a 2,048-byte frame, or at least continue a
/// longer packet in the next frame. i40e and ice give the length in units of 128 bytes, the others
/// exactly (their `*_configure_rx_ring`, Linux 6.12). Most other Intel drivers round it down to
/// 1,024 bytes and deliver the rest of a longer packet as another packet.
const RIGHT_WITH_SMALL_FRAMES: [&str; 6] = ["i40e", "ice", "mlx5_core", "nfp", "st_gmac", "virtio_net"];

/// How packets get from the NIC into the UMEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// The NIC writes into the UMEM.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

impl fmt::Display for CopyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CopyMode::ZeroCopy => "zero-copy",
            CopyMode::Copy => "copy",
        })
    }
}

/// A mode to receive packets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// How the XDP program is attached.
    pub xdp: ModeChoice,
    /// How the sockets are bound.
    pub bind: CopyMode,
    /// Bytes of a frame.
    pub frame_size: u32,
}

/// Why no mode that the settings allow can be used on an interface.
#[derive(Debug, thiserror::Error)]
pub enum ModeError {
    /// Packets of this MTU do not fit a frame.
    #[error(
        "the MTU of `{interface}` is {mtu} bytes, but a frame of {frame_size} bytes holds packets of an MTU of at \
         most {max}{}: {}run `ip link set dev {interface} mtu {max}`",
        if *bind == CopyMode::ZeroCopy { " in zero-copy mode" } else { "" },
        if *frame_size == 2048 && *mtu <= largest_mtu(4096, *bind) { "set `frame_size = 4096`, or " } else { "" }
    )]
    MtuTooLarge {
        /// The interface.
        interface: String,
        /// Its MTU in bytes.
        mtu: u32,
        /// The size of a frame in bytes.
        frame_size: u32,
        /// How the sockets would be bound.
        bind: CopyMode,
        /// The largest MTU in bytes that fits.
        max: u32,
    },
    /// Zero-copy in generic mode, which bypasses the driver.
    #[error(
        "`bind_mode = \"zero-copy\"` needs the driver, and `xdp_mode = \"generic\"` leaves it out: \
         set xdp_mode to \"native\" or \"auto\", or bind_mode to \"copy\" or \"auto\""
    )]
    GenericZeroCopy,
    /// Native mode or zero-copy on an interface that receives packets through others. The kernel
    /// runs the program on those, and a socket of this interface does not get their packets.
    #[error(
        "neither native XDP nor zero-copy works on {interface}, which receives packets through {below}: the kernel drops \
         packets that native XDP there redirects to a socket of {interface}, and does not count them. Run xfan on {below}, \
         or set `xdp_mode = \"generic\"` and `bind_mode = \"copy\"`",
        below = below_of(below)
    )]
    FedFromBelow {
        /// The interface.
        interface: String,
        /// The interfaces below it, as far as they are known.
        below: Vec<String>,
    },
}

/// The names of the interfaces below, for a message.
fn below_of(below: &[String]) -> String {
    if below.is_empty() { "the interfaces below it".to_owned() } else { below.join(", ") }
}

/// The largest MTU, in bytes, whose packets fit a frame.
#[must_use]
pub const fn largest_mtu(frame_size: u32, bind: CopyMode) -> u32 {
    let behind = match bind {
        CopyMode::ZeroCopy => FCS,
        CopyMode::Copy => 0,
    };
    max_length(frame_size).saturating_sub(LINK_HEADER + behind)
}

/// The longest packet, in bytes, that a frame holds.
#[must_use]
pub const fn max_length(frame_size: u32) -> u32 {
    frame_size.saturating_sub(HEADROOM)
}

/// The modes to try, in this order. Never empty.
///
/// # Errors
///
/// [`ModeError`]
pub fn modes(config: &Config, interface: &Interface) -> Result<Vec<Mode>, ModeError> {
    if config.port.xdp_mode == ModeChoice::Generic && config.port.bind_mode == BindMode::ZeroCopy {
        return Err(ModeError::GenericZeroCopy);
    }
    let from_below = interface.is_fed_from_below();
    if from_below
        && (config.port.xdp_mode == ModeChoice::Native || config.port.bind_mode == BindMode::ZeroCopy)
    {
        let (interface, below) = (interface.name.clone(), interface.lower());
        return Err(ModeError::FedFromBelow { interface, below });
    }
    let xdp = if from_below { ModeChoice::Generic } else { config.port.xdp_mode };
    if from_below && config.port.xdp_mode == ModeChoice::Auto {
        let (interface, below) = (&interface.name, below_of(&interface.lower()));
        tracing::warn!(
            interface,
            "it receives packets through {below}, so xfan uses generic XDP; for native XDP run xfan on {below}"
        );
    }
    let hopeless = WITHOUT_ZERO_COPY.contains(&interface.driver.as_str());
    let binds: &[CopyMode] = match config.port.bind_mode {
        BindMode::ZeroCopy => &[CopyMode::ZeroCopy],
        BindMode::Auto if xdp != ModeChoice::Generic && !hopeless => &[CopyMode::ZeroCopy, CopyMode::Copy],
        BindMode::Auto | BindMode::Copy => &[CopyMode::Copy],
    };
    let mut modes = Vec::new();
    let mut refused = None;
    for &bind in binds {
        match frame_size(config.primary.frame_size, bind, interface) {
            Ok(frame_size) => {
                // A driver does zero-copy in native mode only.
                let xdp = if bind == CopyMode::ZeroCopy { ModeChoice::Native } else { xdp };
                modes.push(Mode { xdp, bind, frame_size });
            }
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) if modes.is_empty() => Err(error),
        Some(error) => {
            tracing::warn!("no zero-copy: {error}");
            Ok(modes)
        }
        None => Ok(modes),
    }
}

/// The frame size of the settings, or else the smallest that works. In zero-copy mode a small frame
/// works only if the driver is known to fill it without cutting packets.
fn frame_size(asked: Option<u32>, bind: CopyMode, interface: &Interface) -> Result<u32, ModeError> {
    let small_is_right =
        bind == CopyMode::Copy || RIGHT_WITH_SMALL_FRAMES.contains(&interface.driver.as_str());
    let [small, large] = FRAME_SIZES;
    let size = asked.unwrap_or(if small_is_right && interface.mtu <= largest_mtu(small, bind) {
        small
    } else {
        large
    });
    let max = largest_mtu(size, bind);
    if interface.mtu <= max {
        return Ok(size);
    }
    Err(ModeError::MtuTooLarge {
        interface: interface.name.clone(),
        mtu: interface.mtu,
        frame_size: size,
        bind,
        max,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(driver: &str, mtu: u32) -> Interface {
        let (name, bus) = ("eth1".to_owned(), String::new());
        Interface { name, index: 2, mtu, rx_queues: 4, rx_ring: 256, driver: driver.to_owned(), bus }
    }

    fn modes_of(toml: &str, driver: &str, mtu: u32) -> Result<Vec<Mode>, ModeError> {
        let config = Config::from_toml_str(&format!("interface = 'eth1'\n{toml}"), "f").unwrap();
        modes(&config, &interface(driver, mtu))
    }

    fn tried(toml: &str, driver: &str, mtu: u32) -> Vec<(ModeChoice, CopyMode, u32)> {
        let modes = modes_of(toml, driver, mtu).unwrap();
        modes.into_iter().map(|mode| (mode.xdp, mode.bind, mode.frame_size)).collect()
    }

    use CopyMode::{Copy, ZeroCopy};
    use ModeChoice::{Auto, Generic, Native};

    #[test]
    fn auto_tries_zero_copy_and_then_copy() {
        // igb rounds a frame of 2,048 bytes down to 1,024.
        assert_eq!(tried("", "igb", 1500), [(Native, ZeroCopy, 4096), (Auto, Copy, 2048)]);
        assert_eq!(tried("", "ice", 1500), [(Native, ZeroCopy, 2048), (Auto, Copy, 2048)]);
        assert_eq!(tried("", "veth", 1500), [(Auto, Copy, 2048)]);
        assert_eq!(tried("xdp_mode = 'generic'", "igb", 1500), [(Generic, Copy, 2048)]);
        assert_eq!(tried("bind_mode = 'copy'", "igb", 1500), [(Auto, Copy, 2048)]);
        // An explicit setting is tried, whatever is known of the driver.
        assert_eq!(tried("bind_mode = 'zero-copy'", "veth", 1500), [(Native, ZeroCopy, 4096)]);
        assert_eq!(tried("frame_size = 2048", "igb", 1500), [(Native, ZeroCopy, 2048), (Auto, Copy, 2048)]);
    }

    #[test]
    fn a_frame_holds_every_packet_of_the_mtu() {
        assert_eq!([largest_mtu(2048, Copy), largest_mtu(4096, Copy)], [1770, 3818]);
        assert_eq!([largest_mtu(2048, ZeroCopy), largest_mtu(4096, ZeroCopy)], [1766, 3814]);
        assert_eq!(tried("", "veth", 1770), [(Auto, Copy, 2048)]);
        assert_eq!(tried("", "veth", 1771), [(Auto, Copy, 4096)]);
        assert_eq!(tried("", "ice", 1767), [(Native, ZeroCopy, 4096), (Auto, Copy, 2048)]);
        // The MTU fits copy mode only: zero-copy is not tried.
        assert_eq!(tried("frame_size = 2048", "ice", 1767), [(Auto, Copy, 2048)]);
        let message = modes_of("frame_size = 2048", "veth", 1771).unwrap_err().to_string();
        assert!(message.contains("is 1771 bytes") && message.contains("at most 1770: set"), "{message}");
        assert!(message.contains("`frame_size = 4096`, or run `ip link set dev eth1 mtu 1770`"), "{message}");
        let message = modes_of("", "ice", 9000).unwrap_err().to_string();
        assert!(message.contains("a frame of 4096 bytes"), "{message}");
        assert!(message.contains("at most 3818: run `ip link"), "{message}");
        let asked = modes_of("bind_mode = 'zero-copy'\nframe_size = 2048", "ice", 1767).unwrap_err();
        assert!(asked.to_string().contains("at most 1766 in zero-copy mode: set"), "{asked}");
    }

    #[test]
    fn a_bond_gets_generic_mode_or_is_refused() {
        assert_eq!(tried("", "bonding", 1500), [(Generic, Copy, 2048)]);
        for toml in ["xdp_mode = 'native'", "bind_mode = 'zero-copy'"] {
            let error = modes_of(toml, "bonding", 1500).unwrap_err();
            assert!(matches!(error, ModeError::FedFromBelow { .. }), "{error}");
            assert!(error.to_string().contains("Run xfan on the interfaces below it, or set"), "{error}");
        }
        assert_eq!(below_of(&["a".into(), "b".into()]), "a, b");
        // Without a virtual function it has packets of its own.
        assert_eq!(tried("", "hv_netvsc", 1500), [(Native, ZeroCopy, 4096), (Auto, Copy, 2048)]);
    }

    #[test]
    fn zero_copy_behind_the_drivers_back_is_refused() {
        let error = modes_of("xdp_mode = 'generic'\nbind_mode = 'zero-copy'", "igb", 1500).unwrap_err();
        assert_eq!(crate::exit::Exit::from(&error), crate::exit::Exit::Usage);
    }
}
