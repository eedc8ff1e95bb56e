//! The increase of counters since the start.

use std::collections::BTreeMap;

/// The increase of each counter since it was first read.
#[derive(Clone, Debug, Default)]
pub struct Differences {
    last: BTreeMap<String, u64>,
    since: BTreeMap<String, u64>,
}

impl Differences {
    /// Takes a reading. A counter that goes backwards was reset: its increase continues from the
    /// new value.
    pub fn update(&mut self, now: BTreeMap<String, u64>) {
        for (name, value) in now {
            let more = self.last.get(&name).map_or(0, |last| value.saturating_sub(*last));
            *self.since.entry(name.clone()).or_default() += more;
            self.last.insert(name, value);
        }
    }

    /// The increases, by name of the counter.
    pub fn since_start(&self) -> &BTreeMap<String, u64> {
        &self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_reset_keeps_the_sum() {
        let mut differences = Differences::default();
        let mut update = |values: &[(&str, u64)]| {
            differences.update(values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect());
            differences.since_start().values().copied().collect::<Vec<_>>()
        };
        assert_eq!(update(&[("a", 100)]), [0]);
        // A counter that appears later, with its queue, counts from then on.
        assert_eq!(update(&[("a", 103), ("b", 50)]), [3, 0]);
        assert_eq!(update(&[("a", 2), ("b", 51)]), [3, 1]);
        assert_eq!(update(&[("b", 51)]), [3, 1]);
        assert_eq!(update(&[("a", 4), ("b", 51)]), [5, 1]);
    }
}
