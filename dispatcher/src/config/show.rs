//! The effective settings as a TOML file: what `xfan check` prints.

use std::fmt::Write as _;

use super::Config;
use super::table::Initial;

impl Config {
    /// Every setting, as a file that yields this configuration. Settings that are chosen at start
    /// are comments in it.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut toml = String::new();
        let mut table = "";
        for section in self.sections() {
            if section.table() != table {
                table = section.table();
                let _ = writeln!(toml, "\n[{table}]");
            }
            for setting in section.settings() {
                let key = setting.key();
                // Writing to a String cannot fail.
                let _ = match (section.show(key), setting.initial()) {
                    (Some(value), _) => writeln!(toml, "{key} = {value}"),
                    (None, Initial::Chosen { how, .. }) => writeln!(toml, "# {key}: {how}"),
                    (None, _) => writeln!(toml, "# {key}: not set"),
                };
            }
        }
        toml
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
        let mut config = Config::from_toml_str("interface = 'eth1'", "f").unwrap();
        config.group.command = command.to_vec();
        let shown = config.to_toml();
        assert_eq!(crate::text::printable_lines(&shown), shown);
        assert_eq!(Config::from_toml_str(&shown, "shown").unwrap().group.command, command);
    }

    #[test]
    fn every_key_is_shown() {
        let shown = Config::from_toml_str("interface = 'eth1'", "f").unwrap().to_toml();
        for key in Config::default().keys() {
            let name = key.rsplit('.').next().unwrap();
            let found = shown.lines().any(|line| {
                line.starts_with(&format!("{name} =")) || line.starts_with(&format!("# {name}:"))
            });
            assert!(found, "{key} is missing in\n{shown}");
        }
    }
}
