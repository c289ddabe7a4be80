//! Plots for the documentation: bars of medians, with the spread as a line.

use std::{fmt::Write as _, fs, path::Path};

use crate::report::{Figure, Row, Spread};

/// File, title, work, figure, and whether the axis is logarithmic.
const PLOTS: &[(&str, &str, &str, Figure, bool)] = &[
    (
        "catch-up.svg",
        "Catch-up, rows inserted before the start: events/s from the first record to the last",
        "catch-up, inserts",
        Figure::EventsPerSecond,
        false,
    ),
    (
        "memory.svg",
        "Catch-up: peak resident memory, MiB",
        "catch-up, inserts",
        Figure::PeakResident,
        false,
    ),
    (
        "snapshot.svg",
        "Snapshot: rows/s from the first record to the last",
        "snapshot",
        Figure::EventsPerSecond,
        false,
    ),
    (
        "latency.svg",
        "1,000 commits/s: p99 from the INSERT until a consumer has the record, ms (logarithmic)",
        "latency at 1,000 commits/s",
        Figure::P99,
        true,
    ),
];

const WIDTH: f64 = 860.0;
const LABELS: f64 = 300.0;
/// Where the longest bar ends; the number is right of it.
const END: f64 = 760.0;
const ROW: f64 = 26.0;
const TOP: f64 = 44.0;

pub(crate) fn write(folder: &Path, works: &[(String, Vec<Row>)]) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    for (file, title, work, figure, logarithmic) in PLOTS {
        let bars: Vec<(&str, Spread)> = works
            .iter()
            .filter(|(name, _)| name == work)
            .flat_map(|(_, rows)| rows)
            .filter_map(|row| Some((row.contestant.as_str(), *row.figures.get(figure)?)))
            .collect();
        if !bars.is_empty() {
            fs::write(folder.join(file), bar_chart(title, &bars, *logarithmic))?;
        }
    }
    Ok(())
}

fn bar_chart(title: &str, bars: &[(&str, Spread)], logarithmic: bool) -> String {
    let most = bars
        .iter()
        .map(|(_, spread)| spread.most)
        .fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| {
        let share = if logarithmic {
            // From 0.1 on.
            ((value * 10.0).max(1.0).ln() / (most * 10.0).ln()).max(0.0)
        } else {
            value / most
        };
        LABELS + share * (END - LABELS)
    };
    let height = TOP + ROW * bars.len() as f64 + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"15\">{}</text>\n",
        escaped(title)
    );
    for (index, (label, spread)) in bars.iter().enumerate() {
        let top = TOP + ROW * index as f64;
        let (middle, text) = (top + 9.0, top + 14.0);
        let color = if label.starts_with("Meander") {
            "#2b6cb0"
        } else {
            "#a0aec0"
        };
        // A String takes whatever is written.
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{text}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LABELS}\" y=\"{top}\" width=\"{:.1}\" height=\"18\" fill=\"{color}\"/>\n\
             <line x1=\"{:.1}\" y1=\"{middle}\" x2=\"{:.1}\" y2=\"{middle}\" stroke=\"#1a202c\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{text}\">{}</text>",
            LABELS - 8.0,
            escaped(label),
            x(spread.median) - LABELS,
            x(spread.least),
            x(spread.most),
            x(spread.most) + 8.0,
            spread.number(),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
