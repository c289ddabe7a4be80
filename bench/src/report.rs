//! What was measured: a line of JSON for each round of each contestant, and tables and plots of all lines.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::plot;

/// What a number is, in the order of the tables' columns. The names say the units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Figure {
    /// From the first record to the last.
    #[serde(rename = "events/s")]
    EventsPerSecond,
    /// Of the rows as text, in millions of bytes.
    #[serde(rename = "MB/s")]
    MegabytesPerSecond,
    /// From the start of the process to the last record.
    #[serde(rename = "events/s with start-up")]
    EventsPerSecondWithStart,
    /// From the start of the process to the first record.
    #[serde(rename = "first record, s")]
    FirstRecordSeconds,
    #[serde(rename = "took, s")]
    Seconds,
    #[serde(rename = "speed reached")]
    Speed,
    #[serde(rename = "commits/s")]
    CommitsPerSecond,
    #[serde(rename = "p50, ms")]
    P50,
    #[serde(rename = "p99, ms")]
    P99,
    #[serde(rename = "p99.9, ms")]
    P999,
    #[serde(rename = "max, ms")]
    Max,
    /// Processors that the contestant kept busy.
    #[serde(rename = "cores")]
    Cores,
    /// Processor seconds of the contestant.
    #[serde(rename = "CPU, s")]
    Cpu,
    #[serde(rename = "PostgreSQL's CPU, s")]
    PostgresCpu,
    #[serde(rename = "Kafka's CPU, s")]
    KafkaCpu,
    #[serde(rename = "Redis's CPU, s")]
    RedisCpu,
    #[serde(rename = "receiver's CPU, s")]
    ReceiverCpu,
    /// The most memory that the contestant has had.
    #[serde(rename = "peak memory, MiB")]
    PeakResident,
    /// The memory of the contestant at the end.
    #[serde(rename = "memory, MiB")]
    Resident,
    /// Processors that the rest of the machine kept busy: where this is much, the round says little.
    #[serde(rename = "other work, cores")]
    OtherCores,
}

impl Figure {
    fn heading(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|name| name.as_str().map(str::to_owned))
            .unwrap_or_default()
    }
}

pub(crate) type Figures = BTreeMap<Figure, f64>;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Line {
    /// Seconds since the Unix epoch.
    at: u64,
    work: String,
    contestant: String,
    /// What was measured: the project's commit, or a peer's version.
    version: String,
    figures: Figures,
}

/// The file that the lines go to, or none.
pub(crate) struct Report {
    file: Option<PathBuf>,
}

impl Report {
    pub(crate) fn new(file: PathBuf) -> Self {
        Self { file: Some(file) }
    }

    /// One for the round before the first, in which the services do for once what they will be measured with. A Java machine compiles what it does
    /// often, beside doing it, and the first contestants would pay for that.
    pub(crate) fn of_warm_up() -> Self {
        Self { file: None }
    }

    /// Adds a line for what one contestant did in one round of a work, and shows it.
    pub(crate) fn add(&self, work: &str, contestant: &str, version: &str, figures: Figures) -> anyhow::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let line = Line {
            at: std::time::UNIX_EPOCH.elapsed()?.as_secs(),
            work: work.to_owned(),
            contestant: contestant.to_owned(),
            version: version.to_owned(),
            figures,
        };
        let line = serde_json::to_string(&line)?;
        println!("{line}");
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(file)?;
        writeln!(file, "{line}")?;
        Ok(())
    }

    /// Prints a table for each work, with the median of each figure and the least and the most of it; of each contestant, only the
    /// version that was measured last. Writes plots into a folder, if one is given.
    pub(crate) fn summarize(&self, plots: Option<&Path>) -> anyhow::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let lines = text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<Vec<Line>, _>>()
            .with_context(|| format!("{} has a line of something else", file.display()))?;
        let works = works(&lines);
        for (work, rows) in &works {
            println!("{}", table(work, rows));
        }
        if let Some(folder) = plots {
            plot::write(folder, &works)?;
        }
        Ok(())
    }
}

/// What one contestant did in all rounds of a work.
pub(crate) struct Row {
    pub(crate) contestant: String,
    version: String,
    rounds: usize,
    pub(crate) figures: BTreeMap<Figure, Spread>,
}

/// Of one figure over all rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) most: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let lower = if values.len().is_multiple_of(2) {
            values[middle - 1]
        } else {
            upper
        };
        Some(Self {
            least: *values.first()?,
            median: (lower + upper) / 2.0,
            most: *values.last()?,
        })
    }

    /// The median, as text.
    pub(crate) fn number(self) -> String {
        number(self.median)
    }

    fn cell(self) -> String {
        let (least, median, most) = (number(self.least), self.number(), number(self.most));
        if least == most {
            median
        } else {
            format!("{median} ({least} to {most})")
        }
    }
}

fn number(value: f64) -> String {
    match value {
        large if large >= 1000.0 => thousands(value),
        large if large >= 100.0 => format!("{value:.0}"),
        large if large >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A whole number with commas.
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Works and contestants in the order in which they first came.
fn works(lines: &[Line]) -> Vec<(String, Vec<Row>)> {
    let mut works: Vec<(String, Vec<Row>)> = Vec::new();
    for line in lines {
        let index = works
            .iter()
            .position(|(work, _)| *work == line.work)
            .unwrap_or_else(|| {
                works.push((line.work.clone(), Vec::new()));
                works.len() - 1
            });
        let rows = &mut works[index].1;
        if !rows.iter().any(|row| row.contestant == line.contestant) {
            rows.push(row(line, lines));
        }
    }
    works
}

fn row(of: &Line, lines: &[Line]) -> Row {
    let same = |line: &&Line| line.work == of.work && line.contestant == of.contestant;
    let version = lines.iter().rfind(same).unwrap_or(of).version.clone();
    let lines: Vec<&Line> = lines
        .iter()
        .filter(same)
        .filter(|line| line.version == version)
        .collect();
    let mut values: BTreeMap<Figure, Vec<f64>> = BTreeMap::new();
    for (figure, value) in lines.iter().flat_map(|line| &line.figures) {
        values.entry(*figure).or_default().push(*value);
    }
    Row {
        contestant: of.contestant.clone(),
        version,
        rounds: lines.len(),
        figures: values
            .into_iter()
            .filter_map(|(figure, values)| Some((figure, Spread::of(values)?)))
            .collect(),
    }
}

fn table(work: &str, rows: &[Row]) -> String {
    let mut figures: Vec<Figure> = rows.iter().flat_map(|row| row.figures.keys().copied()).collect();
    figures.sort_unstable();
    figures.dedup();
    let headings: Vec<String> = figures.iter().map(|figure| figure.heading()).collect();
    let mut text = format!(
        "### {work}\n\n| | version | rounds | {} |\n|---|---|---|{}\n",
        headings.join(" | "),
        "---|".repeat(figures.len())
    );
    for row in rows {
        let cells: Vec<String> = figures
            .iter()
            .map(|figure| row.figures.get(figure).map_or_else(String::new, |spread| spread.cell()))
            .collect();
        text.push_str(&format!(
            "| {} | {} | {} | {} |\n",
            row.contestant,
            row.version,
            row.rounds,
            cells.join(" | ")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_median_and_the_spread_of_the_version_that_was_measured_last() {
        let line = |version: &str, value| Line {
            at: 0,
            work: "catch-up".to_owned(),
            contestant: "one".to_owned(),
            version: version.to_owned(),
            figures: Figures::from([(Figure::EventsPerSecond, value)]),
        };
        let lines = [
            line("a", 1.0),
            line("b", 40.0),
            line("b", 1234.0),
            line("b", 20.0),
            line("b", 30.0),
        ];
        let works = works(&lines);
        assert_eq!(
            table(&works[0].0, &works[0].1),
            "### catch-up\n\n| | version | rounds | events/s |\n|---|---|---|---|\n| one | b | 4 | 35.0 (20.0 to 1,234) |\n"
        );
    }
}
