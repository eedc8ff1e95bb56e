//! The primary watches its interface.

use super::{Primary, PrimaryError};
use crate::watch::{Change, Level, Notice, Watch};

impl Primary {
    /// Opens what is needed to watch the interface, so that nothing has to be opened later.
    pub(super) fn begin_watching(&mut self) -> std::io::Result<()> {
        let Some(port) = &self.port else { return Ok(()) };
        self.watch = Some(Watch::begin(&port.interface, port.expected())?);
        self.say_what_is_new(true);
        Ok(())
    }

    /// Ends the primary if its interface is gone, and follows it if it has another name.
    pub(super) fn look_for_interface(&mut self) -> Result<(), PrimaryError> {
        let (Some(watch), Some(port)) = (&mut self.watch, &mut self.port) else { return Ok(()) };
        let Some(name) = watch.name(&self.name) else {
            return Err(PrimaryError::Vanished(self.name.clone()));
        };
        if name != self.name {
            let detail = format!("{} was renamed to {name}: xfan goes on with it", self.name);
            port.interface.name.clone_from(&name);
            self.name = name;
            tracing::warn!(interface = self.name, "{detail}; the control socket stays where it is");
            self.journal.write(None, std::process::id(), "interface", detail);
        }
        Ok(())
    }

    /// Looks at the interface, about once a second, and says what has changed.
    pub(super) fn look_at_interface(&mut self) {
        if self.watch.as_mut().is_some_and(Watch::look) {
            self.say_what_is_new(false);
        }
    }

    /// Says what is the case and was not said yet. What is so from the start may be as it is meant to be.
    fn say_what_is_new(&mut self, at_start: bool) {
        let Some(watch) = &mut self.watch else { return };
        self.notices = watch.conditions();
        self.notices.sort_by_key(|notice| std::cmp::Reverse(notice.level));
        for change in watch.changes(&self.notices) {
            let interface = &self.name;
            let detail = match change {
                Change::Begins(notice) => {
                    let level = if at_start { notice.level } else { notice.level.max(Level::Warn) };
                    match level {
                        Level::Error => tracing::error!(interface, "{notice}"),
                        Level::Warn => tracing::warn!(interface, "{notice}"),
                        Level::Info => tracing::info!(interface, "{notice}"),
                    }
                    if level == Level::Info {
                        continue;
                    }
                    notice.to_string()
                }
                Change::Ends(Notice { what, .. }) => {
                    tracing::info!(interface, "over: {what}");
                    format!("over: {what}")
                }
            };
            self.journal.write(None, std::process::id(), "interface", detail);
        }
    }
}
