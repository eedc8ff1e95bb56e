//! The meter: turns packets into flow records, with the table, the clock, the counters and the
//! output.

use std::time::{Duration, SystemTime};

use xfan_shm::clock::monotonic_ns;
use xfan_worker::packet::Packet;
use xfan_worker::{Batch, Counter, CounterError, Worker};

use crate::output::{Counts, Output, OutputError};
use crate::record::Record;
use crate::table::{Flow, FlowTable};

/// Time between two rounds. A round reads the wall clock, removes expired flows and flushes the
/// output. So a record is written at most a second after its flow has expired.
const ROUND: Duration = Duration::from_secs(1);

/// Meters the flows of one member.
pub struct Meter {
    member: String,
    table: FlowTable,
    output: Output,
    totals: Totals,
    published: Published,
    /// Wall-clock time of the monotonic clock's zero, in nanoseconds since 1970.
    epoch: u64,
    /// When the next round is due.
    next_round: Duration,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Packets that belong to a flow.
    pub packets: u64,
    /// Packets that belong to no flow: not IP, or cut off within the IP header.
    pub unparsed: u64,
    /// Flows that ended because they were idle.
    pub expired: u64,
    /// Flows that ended because the table was full.
    pub evicted: u64,
    /// The records of flows that have ended.
    pub records: Counts,
    /// The part of the lost records that was unwritten when the worker exited.
    pub waited: u64,
}

/// The counters that `xfan stats` shows.
struct Published {
    active: Counter,
    expired: Counter,
    evicted: Counter,
    unparsed: Counter,
    records_waiting: Counter,
    records_lost: Counter,
    packets_lost: Counter,
}

impl Published {
    fn by(worker: &mut Worker) -> Result<Self, CounterError> {
        Ok(Published {
            active: worker.counter("flows_active")?,
            expired: worker.counter("flows_expired")?,
            evicted: worker.counter("flows_evicted")?,
            unparsed: worker.counter("packets_unparsed")?,
            records_waiting: worker.counter("records_waiting")?,
            records_lost: worker.counter("records_lost")?,
            packets_lost: worker.counter("packets_lost")?,
        })
    }
}

impl Meter {
    /// A meter for the flows of `worker`. Publishes its counters.
    ///
    /// # Errors
    /// [`CounterError`] if a counter cannot be published.
    pub fn new(worker: &mut Worker, table: FlowTable, output: Output) -> Result<Self, CounterError> {
        let published = Published::by(worker)?;
        let member = worker.member().to_owned();
        let (totals, next_round) = (Totals::default(), Duration::ZERO);
        Ok(Meter { member, table, output, totals, published, epoch: epoch(), next_round })
    }

    /// Continues after the worker has attached to the next dispatcher: publishes the counters again
    /// and adopts the new member's name. Flows are kept.
    ///
    /// # Errors
    /// [`CounterError`] if a counter cannot be published.
    pub fn go_on(&mut self, worker: &mut Worker) -> Result<(), CounterError> {
        self.published = Published::by(worker)?;
        worker.member().clone_into(&mut self.member);
        Ok(())
    }

    /// Adds the packets of a batch to their flows.
    pub fn add(&mut self, batch: &Batch<'_>) {
        let mut now = Duration::ZERO;
        for packet in batch {
            now = packet.time();
            let data = packet.data();
            match Packet::parse(data) {
                Some(parsed) => {
                    self.totals.packets += 1;
                    if let Some(flow) = self.table.add(&parsed, data.len(), nanoseconds(now)) {
                        self.totals.evicted += 1;
                        self.write(&flow);
                    }
                }
                None => self.totals.unparsed += 1,
            }
        }
        self.publish();
        // The packets' time decides, not the current time: while there is a backlog, the packet
        // that keeps a flow alive may still be in a ring.
        self.round(now);
    }

    /// Expires flows although no packet arrived.
    pub fn idle(&mut self) {
        self.round(Duration::from_nanos(monotonic_ns()));
    }

    /// Reopens the output file.
    pub fn reopen(&mut self) {
        self.output.reopen();
        self.publish();
    }

    /// Whether the reader of the records has closed its pipe.
    pub fn is_in_vain(&self) -> bool {
        self.output.is_broken()
    }

    /// Ends all flows and writes their records. Records that cannot be written are counted as lost,
    /// and the result is an error.
    pub fn finish(&mut self) -> (Totals, Result<(), OutputError>) {
        while let Some(flow) = self.table.remove_oldest() {
            self.write(&flow);
        }
        let lost = self.output.counts().lost;
        let result = self.output.finish();
        self.publish();
        let records = self.output.counts();
        (Totals { records, waited: records.lost - lost, ..self.totals }, result)
    }

    fn round(&mut self, now: Duration) {
        if now < self.next_round {
            return;
        }
        self.next_round = now + ROUND;
        self.epoch = epoch();
        while let Some(flow) = self.table.expire(nanoseconds(now)) {
            self.totals.expired += 1;
            self.write(&flow);
        }
        self.output.flush();
        self.publish();
    }

    fn write(&mut self, flow: &Flow) {
        self.output.write(&Record::new(flow, self.epoch, &self.member), flow.packets);
    }

    /// Publishes the counts of records before those of flows: a reader that sees a flow expired
    /// also sees what happened to its record.
    fn publish(&mut self) {
        let Counts { waiting, lost, packets_lost, .. } = self.output.counts();
        self.published.records_waiting.set(waiting);
        self.published.records_lost.set(lost);
        self.published.packets_lost.set(packets_lost);
        self.published.active.set(self.table.len() as u64);
        self.published.evicted.set(self.totals.evicted);
        self.published.unparsed.set(self.totals.unparsed);
        self.published.expired.set(self.totals.expired);
    }
}

/// Wall-clock time of the monotonic clock's zero, in nanoseconds since 1970.
fn epoch() -> u64 {
    epoch_by(|| {
        let before = monotonic_ns();
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        (before, nanoseconds(since_1970), monotonic_ns())
    })
}

/// Like [`epoch`], where `read` returns the monotonic time, the wall-clock time and the monotonic
/// time again. Uses the quickest of four readings, since a process may lose its CPU between the
/// clocks.
fn epoch_by(read: impl FnMut() -> (u64, u64, u64)) -> u64 {
    let readings = std::iter::repeat_with(read).take(4);
    let quickest = readings.min_by_key(|(before, _, after)| after - before);
    quickest.map_or(0, |(before, since_1970, after)| since_1970.saturating_sub(before.midpoint(after)))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_epoch_is_right_if_the_cpu_is_lost_in_between() {
        const EPOCH: u64 = 1_700_000_000_000_000_000;
        // Two clock reads are 40 ns apart, except for one pair that is 5 ms apart.
        for (lost_before, lost_after) in [(5_000_000, 0), (0, 5_000_000)] {
            let (mut now, mut reading) = (1_000_000, 0);
            let epoch = epoch_by(|| {
                let lost = if reading == 0 { (lost_before, lost_after) } else { (0, 0) };
                reading += 1;
                let before = now;
                let between = before + 40 + lost.0;
                now = between + 40 + lost.1;
                (before, EPOCH + between, now)
            });
            assert_eq!(epoch, EPOCH);
        }
    }
}
