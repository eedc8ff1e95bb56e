//! The primary watches its interface.

use super::{Primary, PrimaryError};
use crate::watch::Presence;

impl Primary {
    /// Opens what is needed to watch the interface, so that nothing has to be opened later.
    pub(super) fn begin_watching(&mut self) -> std::io::Result<()> {
        if let Some(port) = &self.port {
            self.presence = Some(Presence::of(port.interface.index)?);
        }
        Ok(())
    }

    /// Ends the primary if its interface is gone, and follows it if it has another name.
    pub(super) fn look_for_interface(&mut self) -> Result<(), PrimaryError> {
        let (Some(presence), Some(port)) = (&self.presence, &mut self.port) else { return Ok(()) };
        match presence.name() {
            Ok(Some(name)) if name == self.name => {}
            Ok(Some(name)) => {
                let before = std::mem::replace(&mut self.name, name.clone());
                let detail = format!("{before} was renamed to {name}: xfan goes on with it");
                port.interface.name = name;
                tracing::warn!(interface = self.name, "{detail}; the control socket stays where it is");
                self.journal.write(None, std::process::id(), "interface", detail);
            }
            Ok(None) => return Err(PrimaryError::Vanished(self.name.clone())),
            Err(error) => {
                if !std::mem::replace(&mut self.presence_unknown, true) {
                    tracing::error!(
                        interface = self.name,
                        "the kernel does not tell whether the interface is still there: {error}"
                    );
                }
            }
        }
        Ok(())
    }
}
