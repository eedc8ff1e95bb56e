//! From packets to records: the table, the clock, the counters and the output together.

use std::time::{Duration, SystemTime};

use xfan_shm::clock::monotonic_ns;
use xfan_worker::packet::Packet;
use xfan_worker::{Batch, Counter, CounterError, Worker};

use crate::output::{Counts, Output, OutputError};
use crate::record::Record;
use crate::table::{Flow, FlowTable};

/// Time between two looks at the wall clock, at what has expired, and at what is to be written out.
const ROUND: Duration = Duration::from_secs(1);

/// Meters the flows of one member.
pub struct Meter {
    member: String,
    table: FlowTable,
    output: Output,
    totals: Totals,
    published: Published,
    /// Time of the monotonic clock's zero, in nanoseconds since 1970.
    epoch: u64,
    /// When the next round is due.
    next_round: Duration,
}

/// What has been seen so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Packets that belong to a flow.
    pub packets: u64,
    /// Packets that belong to none: not IP, or cut off within its header.
    pub unparsed: u64,
    /// Flows that were idle for too long.
    pub expired: u64,
    /// Flows that had to make room.
    pub evicted: u64,
    /// What became of the records of flows that are over.
    pub records: Counts,
    /// Of the records lost, those that waited to be written at the end.
    pub waited: u64,
}

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
    /// Begins, and publishes the counters.
    ///
    /// # Errors
    /// [`CounterError`]
    pub fn new(worker: &mut Worker, table: FlowTable, output: Output) -> Result<Self, CounterError> {
        let published = Published::by(worker)?;
        let member = worker.member().to_owned();
        let (totals, next_round) = (Totals::default(), Duration::ZERO);
        Ok(Meter { member, table, output, totals, published, epoch: epoch(), next_round })
    }

    /// Goes on with the next dispatcher, to which the worker has attached.
    ///
    /// # Errors
    /// [`CounterError`]
    pub fn go_on(&mut self, worker: &mut Worker) -> Result<(), CounterError> {
        self.published = Published::by(worker)?;
        worker.member().clone_into(&mut self.member);
        Ok(())
    }

    /// Counts the packets of a batch.
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
        // By the packets' time: while there is a backlog, the packet that keeps a flow alive may still be in a ring.
        self.round(now);
    }

    /// Nothing came: only time goes on.
    pub fn idle(&mut self) {
        self.round(Duration::from_nanos(monotonic_ns()));
    }

    /// Opens the output anew.
    pub fn reopen(&mut self) {
        self.output.reopen();
        self.publish();
    }

    /// Whether there is nobody to write records for.
    pub fn is_in_vain(&self) -> bool {
        self.output.is_broken()
    }

    /// Writes out all flows. What cannot be written is counted as lost, and an error.
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

    /// What became of the records first: whoever sees how many flows have expired sees that as well.
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

/// Time of the monotonic clock's zero, in nanoseconds since 1970.
fn epoch() -> u64 {
    epoch_by(|| {
        let before = monotonic_ns();
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        (before, nanoseconds(since_1970), monotonic_ns())
    })
}

/// The same, of the quickest of a few readings of the monotonic clock, the wall clock and the monotonic
/// clock: a process may lose its CPU between two of them.
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
    fn the_epoch_is_right_if_the_process_loses_its_cpu_between_the_clocks() {
        const EPOCH: u64 = 1_700_000_000_000_000_000;
        // 40 ns between two readings, but for one that takes 5 ms.
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
