//! What the parts of a work cost together.

use std::{collections::BTreeMap, fs, time::Instant};

use anyhow::Context as _;

use crate::{
    process::{TICKS, memory, stat},
    report::{Figure, Figures},
};

/// The memory that a process has now, in MiB.
pub(crate) fn resident(process: u32) -> anyhow::Result<f64> {
    memory(process, "VmRSS:")
}

/// What the parts have used since it was made.
pub(crate) struct Meter {
    /// The process, whether its children count, as PostgreSQL's do, and what they had used.
    parts: Vec<(Figure, u32, bool, f64)>,
    machine: f64,
    own: f64,
    since: Instant,
}

impl Meter {
    /// Of these processes; the one in the figure of [`Figure::PostgresCpu`] has children.
    pub(crate) fn start(parts: impl IntoIterator<Item = (Figure, u32)>) -> anyhow::Result<Self> {
        let with_cost = |(figure, process)| {
            let children = figure == Figure::PostgresCpu;
            anyhow::Ok((figure, process, children, cpu_of(process, children)?))
        };
        Ok(Self {
            parts: parts.into_iter().map(with_cost).collect::<anyhow::Result<_>>()?,
            machine: machine_cpu()?,
            own: own_cpu()?,
            since: Instant::now(),
        })
    }

    /// Processor seconds of each part, and how many processors were kept busy by what is neither a part nor the benchmark itself.
    pub(crate) fn read(&self) -> anyhow::Result<Figures> {
        let mut figures = BTreeMap::new();
        for (figure, process, children, before) in &self.parts {
            figures.insert(*figure, cpu_of(*process, *children)? - before);
        }
        let known: f64 = figures.values().sum::<f64>() + own_cpu()? - self.own;
        let others = (machine_cpu()? - self.machine - known) / self.since.elapsed().as_secs_f64();
        // The kernel's sums are samples: those of an idle machine can be a little less than those of its processes.
        figures.insert(Figure::OtherCores, others.max(0.0));
        Ok(figures)
    }
}

/// Processor seconds of the programs that the benchmark ran and has waited for.
pub(crate) fn ended_children_cpu() -> anyhow::Result<f64> {
    Ok(times(std::process::id())?.ended_children)
}

fn own_cpu() -> anyhow::Result<f64> {
    let times = times(std::process::id())?;
    Ok(times.own + times.ended_children)
}

struct Times {
    own: f64,
    /// Of children that were waited for.
    ended_children: f64,
    parent: u32,
}

fn times(process: u32) -> anyhow::Result<Times> {
    let numbers = stat(process)?;
    Ok(Times {
        own: f64::from(numbers[11] + numbers[12]) / TICKS,
        ended_children: f64::from(numbers[13] + numbers[14]) / TICKS,
        parent: numbers[1],
    })
}

/// With `children`, of those as well that a process has and has had.
fn cpu_of(process: u32, children: bool) -> anyhow::Result<f64> {
    let Times {
        own, ended_children, ..
    } = times(process)?;
    if !children {
        return Ok(own);
    }
    let mut seconds = own + ended_children;
    for entry in fs::read_dir("/proc")? {
        let child = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        // One that has ended meanwhile is counted next time.
        if let Some(times) = child.and_then(|child| times(child).ok()) {
            seconds += if times.parent == process { times.own } else { 0.0 };
        }
    }
    Ok(seconds)
}

/// Processor seconds that were not idle.
fn machine_cpu() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("no processors")?;
    // user nice system idle iowait irq softirq steal
    let ticks: f64 = line
        .split_whitespace()
        .skip(1)
        .take(8)
        .enumerate()
        .filter(|(index, _)| ![3, 4].contains(index))
        .filter_map(|(_, ticks)| ticks.parse::<f64>().ok())
        .sum();
    Ok(ticks / TICKS)
}
