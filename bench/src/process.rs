//! What a process costs, from `/proc`.

use std::fs;

use anyhow::Context as _;

/// Ticks of `/proc` in a second.
pub(crate) const TICKS: f64 = 100.0;

/// User and system time of a process, in seconds.
pub(crate) fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    let numbers = stat(process)?;
    Ok(f64::from(numbers[11] + numbers[12]) / TICKS)
}

/// The most memory that it has had, in MiB.
pub(crate) fn peak_resident(process: u32) -> anyhow::Result<f64> {
    memory(process, "VmHWM:")
}

/// A line of `/proc/PID/status`, in MiB.
pub(crate) fn memory(process: u32, field: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .with_context(|| format!("no {field}"))?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes / 1024.0)
}

/// The fields of `/proc/PID/stat` up to `cstime`, from the state on: 1 is `ppid`, 11 to 14 are `utime`, `stime`, `cutime`, `cstime`. What is
/// no such number is 0.
pub(crate) fn stat(process: u32) -> anyhow::Result<[u32; 15]> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no fields")?;
    let mut numbers = [0; 15];
    for (number, field) in numbers.iter_mut().zip(fields.split(' ')) {
        *number = field.parse().unwrap_or_default();
    }
    Ok(numbers)
}
