//! What a process costs.

use std::fs;

use anyhow::Context as _;

/// User and system time, from `/proc/PID/stat` (fields 14 and 15, in hundredths of a second).
pub(crate) fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no fields")?;
    let ticks: u64 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse().unwrap_or(0))
        .sum();
    Ok(ticks as f64 / 100.0)
}

/// The same of a process and of those that it started, as PostgreSQL's are.
pub(crate) fn cpu_seconds_with_children(process: u32) -> anyhow::Result<f64> {
    let mut seconds = cpu_seconds(process)?;
    for entry in fs::read_dir("/proc")? {
        let Some(child) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        if parent.and_then(|parent| parent.trim().parse().ok()) == Some(process) {
            seconds += cpu_seconds(child).unwrap_or(0.0);
        }
    }
    Ok(seconds)
}

/// The most memory that it has had, in MiB.
pub(crate) fn peak_resident(process: u32) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("no VmHWM")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes / 1024.0)
}
