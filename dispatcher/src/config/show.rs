//! The effective settings as a TOML file: what `xfan check` prints.

use std::fmt::Write as _;

use super::value::{format_duration, format_memory};
use super::{BindMode, Config, ModeChoice, OnEmpty, OnLoss, Owner, Queues, WorkerOutput, format_list};
use crate::text::escaped_json;

impl Config {
    /// Every setting, as a file that yields this configuration. Settings that are chosen at start
    /// stand in it as comments.
    #[must_use]
    pub fn to_toml(&self) -> String {
        // TOML has the escapes of JSON.
        let text = |text: &str| escaped_json(&toml::Value::from(text).to_string());
        let list = |items: &[String]| escaped_json(&toml::Value::from(items.to_vec()).to_string());
        let auto = |number: Option<u32>| number.map_or_else(|| text("auto"), |number| number.to_string());
        let queues = match &self.queues {
            Queues::All => text("all"),
            Queues::List(list) => format!("{list:?}"),
        };
        let xdp_mode = match self.xdp_mode {
            ModeChoice::Auto => "auto",
            ModeChoice::Native => "native",
            ModeChoice::Generic => "generic",
        };
        let bind_mode = match self.bind_mode {
            BindMode::Auto => "auto",
            BindMode::ZeroCopy => "zero-copy",
            BindMode::Copy => "copy",
        };
        let chosen = |key: &str, how: &str| format!("# {key}: {how}");
        let lines = [
            format!("interface = {}", text(&self.interface)),
            format!("queues = {queues}"),
            format!("workers = {}", self.workers),
            format!(
                "max_workers = {}",
                self.max_workers.map_or_else(|| text("auto"), |number| number.to_string())
            ),
            format!("command = {}", list(&self.command)),
            self.cores.as_ref().map_or_else(
                || chosen("cores", "chosen at start, see `xfan topology`"),
                |cores| format!("cores = {}", text(&format_list(cores))),
            ),
            self.user.as_ref().map_or_else(
                || chosen("user", "who called sudo, else nobody"),
                |user| format!("user = {}", text(user)),
            ),
            format!("pass = {}", list(&self.pass.iter().map(ToString::to_string).collect::<Vec<_>>())),
            format!("socket = {}", text(&self.socket.to_string_lossy())),
            format!("xdp_mode = {}", text(xdp_mode)),
            format!("bind_mode = {}", text(bind_mode)),
            format!("frame_size = {}", auto(self.frame_size)),
            format!("rx_ring = {}", self.rx_ring),
            format!("ring_slots = {}", auto(self.ring_slots)),
            format!("frames = {}", auto(self.frames)),
            format!("batch = {}", self.batch),
            self.hash_key.map_or_else(
                || chosen("hash_key", "random at every start"),
                |key| format!("hash_key = \"{:032x}\"", u128::from_be_bytes(key)),
            ),
            format!("start_timeout = {}", text(&format_duration(self.start_timeout))),
            format!("stop_timeout = {}", text(&format_duration(self.stop_timeout))),
            format!("restart = {}", text(self.restart.policy.name())),
            format!("restart_delay = {}", text(&format_duration(self.restart.delay))),
            format!("start_limit_burst = {}", self.restart.limit_burst),
            format!("start_limit_interval = {}", text(&format_duration(self.restart.limit_interval))),
            format!("hang_timeout = {}", text(&format_duration(self.hang_timeout))),
            format!("survive = {}", self.survive),
            format!(
                "on_loss = {}",
                text(match self.on_loss {
                    OnLoss::Requeue => "requeue",
                    OnLoss::Hold => "hold",
                })
            ),
            format!("hold_timeout = {}", text(&format_duration(self.hold_timeout))),
            format!(
                "on_empty = {}",
                text(match self.on_empty {
                    OnEmpty::Drop => "drop",
                    OnEmpty::Pass => "pass",
                })
            ),
            format!(
                "worker_memory = {}",
                text(&self.worker_memory.map_or_else(|| "unlimited".to_owned(), format_memory))
            ),
            format!("worker_processes = {}", self.worker_processes),
            format!("worker_cpu_weight = {}", self.worker_cpu_weight),
            format!("worker_sandbox = {}", self.worker_sandbox),
            format!(
                "worker_output = {}",
                match &self.worker_output {
                    WorkerOutput::Log => text("log"),
                    WorkerOutput::Null => text("null"),
                    WorkerOutput::Journal => text("journal"),
                    WorkerOutput::File(path) => text(&path.to_string_lossy()),
                }
            ),
            "\n[control]".to_owned(),
            format!("allow_users = {}", list(&self.control.allow_users)),
            format!("allow_groups = {}", list(&self.control.allow_groups)),
            self.control.socket_owner.as_ref().map_or_else(
                || chosen("socket_owner", "the workers' user"),
                |Owner { user, group }| {
                    let group = group.as_ref().map_or_else(String::new, |group| format!(":{group}"));
                    format!("socket_owner = {}", text(&(user.clone().unwrap_or_default() + &group)))
                },
            ),
            self.control.socket_mode.map_or_else(
                || chosen("socket_mode", "0600, or 0666 with allow_users or allow_groups"),
                |mode| format!("socket_mode = \"{mode:04o}\""),
            ),
            "\n[idle]".to_owned(),
            format!("spin = {}", text(&format_duration(self.idle.spin))),
            format!("yield = {}", text(&format_duration(self.idle.yielding))),
            "\n[log]".to_owned(),
            format!("level = {}", text(self.log.name())),
            self.log_file.as_ref().map_or_else(
                || chosen("file", "standard error"),
                |path| format!("file = {}", text(&path.to_string_lossy())),
            ),
        ];
        lines.iter().fold(String::new(), |mut all, line| {
            let _ = writeln!(all, "{line}");
            all
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_a_file_that_says_the_same() {
        let full = "interface = 'eth1'\nqueues = '0-3,7'\nworkers = 4\ncommand = ['w', '--say', 'a \"b\" \\ c']\n\
                    cores = '4-7,2'\nuser = 'daemon'\npass = ['icmp', 'tcp/22']\nsocket = '/tmp/x.sock'\n\
                    xdp_mode = 'native'\nbind_mode = 'zero-copy'\nframe_size = 4096\nrx_ring = 512\n\
                    ring_slots = 1024\nframes = 9000\nbatch = 32\nhash_key = '000102030405060708090a0b0c0d0e0f'\n\
                    start_timeout = '1500ms'\nstop_timeout = '0s'\nrestart = 'always'\n\
                    restart_delay = '7ms'\nstart_limit_burst = 9\nstart_limit_interval = '3s'\n\
                    hang_timeout = '0s'\nmax_workers = 9\nsurvive = true\non_loss = 'hold'\nhold_timeout = '9s'\non_empty = 'pass'\nworker_memory = '3GiB'\nworker_processes = 9\n\
                    worker_cpu_weight = 7\nworker_sandbox = true\nworker_output = '/x/{member}'\n[control]\nallow_users = ['a']\n\
                    allow_groups = ['b', 'c']\nsocket_owner = ':adm'\nsocket_mode = '0660'\n[idle]\nspin = '7us'\nyield = '0s'\n\
                    [log]\nlevel = 'trace'\nfile = '/x/log'";
        for text in ["interface = 'eth1'", full] {
            let config = Config::from_toml_str(text, "f").unwrap();
            let shown = config.to_toml();
            assert_eq!(Config::from_toml_str(&shown, "shown").unwrap(), config, "{shown}");
        }
    }

    #[test]
    fn what_steers_a_terminal_is_escaped() {
        let command = ["w".to_owned(), "a\u{202e}\u{9b}b\u{1b}\n".to_owned()];
        let config =
            Config { command: command.to_vec(), ..Config::from_toml_str("interface = 'eth1'", "f").unwrap() };
        let shown = config.to_toml();
        assert_eq!(crate::text::printable_lines(&shown), shown);
        assert_eq!(Config::from_toml_str(&shown, "shown").unwrap().command, command);
    }

    #[test]
    fn every_key_is_shown() {
        let shown = Config::from_toml_str("interface = 'eth1'", "f").unwrap().to_toml();
        for key in super::super::file::KEYS {
            let name = key.rsplit('.').next().unwrap();
            let found = shown.lines().any(|line| {
                line.starts_with(&format!("{name} =")) || line.starts_with(&format!("# {name}:"))
            });
            assert!(found, "{key} is missing in\n{shown}");
        }
    }
}
